"""InfluxQL for the read-only check, kept apart so that it can be tried on a real server as well.

The measurements here are ``m`` (field ``f``, tag ``t``), and ``stolen``, which a statement that
gets through would write.
"""

from __future__ import annotations

#: These only read, and the server takes them.
READING = [
    "SHOW DATABASES",
    "show measurements",
    "SHOW MEASUREMENTS WITH MEASUREMENT =~ /m.*/",
    "SHOW MEASUREMENTS WITH MEASUREMENT = /m;n/",
    "SHOW TAG VALUES WITH KEY IN (\"t\")",
    "SELECT f FROM m",
    "  SELECT f FROM m ; SELECT f FROM m;; ",
    'SELECT "into" FROM m',
    'SELECT "f;INTO" FROM "m"',
    "SELECT f FROM m WHERE t = 'a;b INTO \\' \\\\'",
    "SELECT f -- INTO q\n FROM m",
    "SELECT f /* INTO q; DROP */ FROM m",
    "SELECT f /***/ FROM m",
    "SELECT f FROM m -- DROP",
    "SELECT f FROM m WHERE t =~ /x;y' INTO/",
    "SELECT f FROM m WHERE t =~ /a\\/ INTO /",
    "SELECT f FROM m WHERE t !~ /\"/ AND f > 4 / 2",
    "SELECT f/2, f / 2 FROM m WHERE f > 1./2",
    "SELECT f::float/2 FROM m",
    "SELECT (f)/2 FROM m",
    "SELECT f + .5 FROM m",
    "SELECT mean(/f/) FROM m",
    "SELECT mean(f) FROM m WHERE time > now() - 1h/2 GROUP BY time(1m), /t/ fill(none)",
    "SELECT /f/ FROM /m/, /n/",
    "SELECT f FROM autogen./m/",
    "SELECT f FROM (SELECT f FROM m)",
    "SELECT $into FROM m",
    "SELECT f FROM m WHERE t = $v / 2",
    "SELECT f AS \"INTO\" FROM m",
    "EXPLAIN SELECT f FROM m",
    "EXPLAIN ANALYZE SELECT f FROM m",
]

#: Posted, each of these writes: points into ``stolen``, or it takes ``m`` away.
WRITING = [
    "SELECT f INTO stolen FROM m",
    "select f into stolen from m",
    "SELECT f\tInTo\nstolen FROM m",
    "SELECT f /* x */ INTO stolen FROM m",
    "SELECT f/* x */INTO/**/stolen FROM m",
    "SELECT f --x\nINTO stolen FROM m",
    "SELECT f --x\rINTO stolen FROM m",
    "SELECT f -- '\n INTO stolen FROM m -- '",
    "SELECT f INTO $into FROM m",
    "SELECT f INTO autogen.\"stolen\" FROM m",
    "SELECT f INTO \"stolen\" FROM m WHERE t =~ /a/",
    "SELECT f AS \"\\\"\" INTO stolen FROM m",
    "SELECT f FROM m; SELECT f INTO stolen FROM m",
    "SELECT f FROM m WHERE t = '\\''; SELECT f INTO stolen FROM m --'",
    "SELECT f FROM m WHERE t =~ /\\\\\\// ; SELECT f INTO stolen FROM m --/",
    "SELECT f FROM m WHERE f > 1./2; SELECT f INTO stolen FROM m WHERE f > 1/2",
    "SELECT f FROM m /* */; SELECT f INTO stolen FROM m --*/",
    "DROP MEASUREMENT m",
    ";DROP MEASUREMENT m",
    "/**/drop/**/measurement m",
    "SELECT f FROM m; DROP MEASUREMENT m",
    "SELECT f FROM m --\n; DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t = 'x'; DROP MEASUREMENT m --'",
    "SELECT f FROM m WHERE t =~ /x/; DROP MEASUREMENT m --/",
    "DELETE FROM m",
    "DROP SERIES FROM m",
    # The end of a text for influxd's scanner, and yet it reads on behind it.
    "SELECT f FROM m --\0; DROP MEASUREMENT m",
    # Division where a scanner that takes the dot for a source's would see a regex.
    "SELECT f./2 INTO stolen FROM m WHERE f > 1 / 3",
    "SELECT m.f, f./2 INTO stolen FROM m WHERE f > 1 / 3",
]

#: The server refuses these, or they do nothing; whether they read cannot be told for sure.
UNREADABLE = [
    "",
    " ; -- nothing",
    "SELECT f INTO stolen",
    "SELECT f FROM (SELECT f INTO stolen FROM m)",
    "EXPLAIN SELECT f INTO stolen FROM m",
    "EXPLAIN ANALYZE SELECT f INTO stolen FROM m",
    "EXPLAIN DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t = 'a; DROP MEASUREMENT m",
    'SELECT "f FROM m; DROP MEASUREMENT m',
    "SELECT f FROM m /* ; DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t = 'a\n'; DROP MEASUREMENT m --'",
    "SELECT f FROM m WHERE t = 'a\\x'; DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t =~ /a\n/; DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t =~ /a",
    "SELECT f FROM m WHERE t = /a/ / /b/",
    "SELECT f FROM m WHERE / 2",
    "ſELECT f FROM m",
    "ＳELECT f FROM m",
    "\ufeffSELECT f FROM m",
    "SELECT f\xa0FROM m",
    "SELECT f FROM m!",
    "SELECT f FROM m \\",
    "SELECT f FROM m\ud800",
    "WITH x",
    "$x f FROM m",
    '"SHOW" DATABASES',
    'SHOW"x" DATABASES',
]
