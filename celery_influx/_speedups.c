/* The way of an ordinary point in C, from its dicts to the buffer: line_protocol.py's encoder,
stamps.py's Stamps, buffer.py's Buffer, and database.py's `_send`, which joins them, or writes to
relay.py's pipe in a pool child; reading lines back from there; and of a task's run
under_way.py's Run, task_points.py's `run_line`, and of an ordinary one what ordinary.py does, with
what plugin.py and relay.py do for that.

Whatever is out of the ordinary, and every error, is left to the Python it stands in for: so there
is one rule, and this file holds none that Python does not. What must hold here, too:

- While a point is read no Python code runs: only exact types are looked at, whose hashing and
  comparing is C's. The clock, `on_left_out` and the Python encoder, which are Python's, are called
  when nothing of the point is being walked through; the line begun is on this call's own stack, so
  that they may send points themselves, raise, or be interrupted by a signal's handler.
- The interpreter's lock is the only one. A free-threaded Python (3.13t) switches it on for us, as
  for every extension that does not ask it not to: the account in shared memory needs it, too.
- The module has no state but its types, each interpreter its own; sub-interpreters with locks of
  their own may use it side by side.
- What is made here never changes after it is made, but a buffer, which holds bytes only, the names
  that an encoder knows, which are exact str, and a run, which may break its cycles: so nothing is
  ever called half taken apart.
- Every other reference to what a point holds is borrowed from the point, which the caller holds,
  inside of one walk. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <marshal.h>
#include <structmember.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* As in line_reader.py. */
#define MAX_LENGTH 65535
#define MIN_TIME (-9223372036854775806LL)
#define MAX_TIME 9223372036854775806LL

/* What is looked up: in a task's request, in its task and in what Celery keeps of it, in our own
objects, and in what Celery says of a run's end. */
enum {
    HEADER_NAME,
    ETA,
    RETRIES,
    IS_EAGER,
    HOSTNAME,
    DELIVERY_INFO,
    EXCHANGE,
    ROUTING_KEY,
    INFLUX,
    ACKS_LATE,
    REQUEST_STACK,
    LOCAL,
    STORAGE,
    IDENT,
    STACK,
    DICT,
    QUICK,
    ACCEPT,
    HEADS,
    OWED,
    IMPATIENT,
    PID,
    CALLED,
    TASK,
    TASK_ID,
    RUN_STATE,
    SUCCESS,
    NAMES
};
static const char *const names[NAMES] = {
    [HEADER_NAME] = "celery_influx",
    [ETA] = "eta",
    [RETRIES] = "retries",
    [IS_EAGER] = "is_eager",
    [HOSTNAME] = "hostname",
    [DELIVERY_INFO] = "delivery_info",
    [EXCHANGE] = "exchange",
    [ROUTING_KEY] = "routing_key",
    [INFLUX] = "influx",
    [ACKS_LATE] = "acks_late",
    [REQUEST_STACK] = "request_stack",
    [LOCAL] = "_local",
    [STORAGE] = "__storage__",
    [IDENT] = "__ident_func__",
    [STACK] = "stack",
    [DICT] = "__dict__",
    [QUICK] = "quick",
    [ACCEPT] = "_accept",
    [HEADS] = "heads",
    [OWED] = "_owed",
    [IMPATIENT] = "_impatient",
    [PID] = "pid",
    [CALLED] = "name",
    [TASK] = "task",
    [TASK_ID] = "task_id",
    [RUN_STATE] = "state",
    [SUCCESS] = "SUCCESS",
};

/* This module's, in this interpreter. */
typedef struct {
    PyTypeObject *encoder, *stamps, *lines, *buffer, *sender, *method, *run;
    PyObject *names[NAMES];
} State;

/* -- the line ------------------------------------------------------------------------------------ */

/* What a step came to. RARE: the Python encoder has the word. BROKEN: an exception is set. */
enum { DONE, RARE, BROKEN };

typedef struct {
    char *text;
    Py_ssize_t length, capacity;
    char small[2048];
} Line;

static void line_begin(Line *line)
{
    line->text = line->small;
    line->length = 0;
    line->capacity = sizeof line->small;
}

static void line_end(Line *line)
{
    if (line->text != line->small)
        PyMem_Free(line->text);
}

/* Make room for so many bytes more. */
static int line_room(Line *line, Py_ssize_t more)
{
    if (more <= line->capacity - line->length)
        return DONE;
    Py_ssize_t capacity = 2 * (line->length + more);
    char *text = PyMem_Malloc((size_t)capacity);
    if (text == NULL) {
        PyErr_NoMemory();
        return BROKEN;
    }
    memcpy(text, line->text, (size_t)line->length);
    line_end(line);
    line->text = text;
    line->capacity = capacity;
    return DONE;
}

/* Where room has been made. */
static inline void put(Line *line, char byte)
{
    line->text[line->length++] = byte;
}

static inline void put_bytes(Line *line, const char *bytes, Py_ssize_t length)
{
    memcpy(line->text + line->length, bytes, (size_t)length);
    line->length += length;
}

/* -- text ---------------------------------------------------------------------------------------- */

/* What is done with a character, by what the text is. */
enum { PLAIN, ESCAPED, TOO_RARE };
enum { MEASUREMENT, TAG, LABEL, FIELD, VALUE, TEXTS }; /* a tag's value is a label */

static unsigned char treatment[TEXTS][128];

static void fill_treatments(void)
{
    for (int of = MEASUREMENT; of <= FIELD; of++) {
        memset(treatment[of], TOO_RARE, 0x20);
        treatment[of]['\\'] = TOO_RARE;
        treatment[of]['#'] = TOO_RARE; /* a comment; and "#!~" parts series from fields in files */
        treatment[of][','] = treatment[of][' '] = ESCAPED;
    }
    treatment[TAG]['='] = treatment[LABEL]['='] = treatment[FIELD]['='] = ESCAPED;
    treatment[VALUE]['"'] = treatment[VALUE]['\\'] = ESCAPED;
}

/* Whether it is an empty str. What is not ready, as old extensions make it up to Python 3.11, has
no length yet, and is no such one. */
static int is_empty(PyObject *text)
{
    return PyUnicode_GET_LENGTH(text) == 0 && PyUnicode_IS_READY(text);
}

/* A str in UTF-8. Empty names are the caller's business. */
static int put_text(Line *line, PyObject *text, int what)
{
    const unsigned char *treat = treatment[what];
    Py_ssize_t length = PyUnicode_GET_LENGTH(text);
    if (length > MAX_LENGTH || (length == 0 && !is_empty(text)))
        return RARE;
    if (PyUnicode_IS_COMPACT_ASCII(text)) {
        if (line_room(line, 2 * length))
            return BROKEN;
        const unsigned char *from = PyUnicode_1BYTE_DATA(text), *end = from + length;
        char *to = line->text + line->length;
        for (; from < end; from++) {
            if (treat[*from] != PLAIN) {
                if (treat[*from] == TOO_RARE)
                    return RARE;
                *to++ = '\\';
            }
            *to++ = (char)*from;
        }
        line->length = to - line->text;
        return DONE;
    }
    if (line_room(line, 4 * length))
        return BROKEN;
    int kind = PyUnicode_KIND(text);
    const void *data = PyUnicode_DATA(text);
    for (Py_ssize_t i = 0; i < length; i++) {
        Py_UCS4 c = PyUnicode_READ(kind, data, i);
        if (c < 0x80) {
            if (treat[c] == TOO_RARE)
                return RARE;
            if (treat[c] == ESCAPED)
                put(line, '\\');
            put(line, (char)c);
        } else if (c < 0x800) {
            put(line, (char)(0xc0 | c >> 6));
            put(line, (char)(0x80 | (c & 0x3f)));
        } else if (c < 0x10000) {
            if (c >= 0xd800 && c < 0xe000)
                return RARE; /* half of a surrogate pair, no character */
            put(line, (char)(0xe0 | c >> 12));
            put(line, (char)(0x80 | (c >> 6 & 0x3f)));
            put(line, (char)(0x80 | (c & 0x3f)));
        } else {
            put(line, (char)(0xf0 | c >> 18));
            put(line, (char)(0x80 | (c >> 12 & 0x3f)));
            put(line, (char)(0x80 | (c >> 6 & 0x3f)));
            put(line, (char)(0x80 | (c & 0x3f)));
        }
    }
    return DONE;
}

/* -- numbers ------------------------------------------------------------------------------------- */

#define LONGEST_NUMBER 32

static void put_integer(Line *line, long long value)
{
    static const char pairs[] =
        "00010203040506070809101112131415161718192021222324252627282930313233343536373839"
        "40414243444546474849505152535455565758596061626364656667686970717273747576777879"
        "8081828384858687888990919293949596979899";
    char digits[2 * LONGEST_NUMBER], *end = digits + LONGEST_NUMBER, *first = end;
    unsigned long long rest = value < 0 ? -(unsigned long long)value : (unsigned long long)value;
    while (rest >= 10000) {
        unsigned four = (unsigned)(rest % 10000);
        first -= 4;
        memcpy(first, pairs + 2 * (four / 100), 2);
        memcpy(first + 2, pairs + 2 * (four % 100), 2);
        rest /= 10000;
    }
    while (rest >= 100) {
        first -= 2;
        memcpy(first, pairs + 2 * (rest % 100), 2);
        rest /= 100;
    }
    if (rest >= 10) {
        first -= 2;
        memcpy(first, pairs + 2 * rest, 2);
    } else {
        *--first = (char)('0' + rest);
    }
    if (value < 0)
        *--first = '-';
    memcpy(line->text + line->length, first, LONGEST_NUMBER); /* at once, whatever follows them */
    line->length += end - first;
}

/* _shortest.cpp */
int celery_influx_repr(double value, char *text);

static int put_float(Line *line, double value)
{
    int length = celery_influx_repr(value, line->text + line->length);
    if (length < 0)
        return BROKEN;
    line->length += length;
    return DONE;
}

/* -- stamps -------------------------------------------------------------------------------------- */

#define SLOTS 1000
#define PUT_BACK 1000000000LL

typedef struct {
    PyObject_HEAD
    PyObject *clock; /* callable; None: the system's */
    long long slot, last;
} Stamps;

/* The time by a clock that is Python's; -1 with an exception set where it raises. */
static int ask(PyObject *clock, long long *ns)
{
    PyObject *given = PyObject_CallNoArgs(clock);
    if (given == NULL)
        return -1;
    *ns = PyLong_AsLongLong(given);
    Py_DECREF(given);
    return *ns == -1 && PyErr_Occurred() ? -1 : 0;
}

/* -1 with an exception set where the clock raises. */
static int next_stamp(Stamps *self, long long *stamp)
{
    long long now;
    if (self->clock == Py_None) {
        struct timespec time;
        clock_gettime(CLOCK_REALTIME, &time);
        now = time.tv_sec * 1000000000LL + time.tv_nsec;
    } else if (ask(self->clock, &now)) {
        return -1;
    }
    long long rest = now % SLOTS;
    now += self->slot - rest - (rest < 0 ? SLOTS : 0);
    if (now <= self->last && self->last < now + PUT_BACK)
        now = self->last + SLOTS;
    self->last = now;
    *stamp = now;
    return 0;
}

static PyObject *stamps_call(Stamps *self, PyObject *args, PyObject *kwargs)
{
    long long stamp;
    if (!PyArg_ParseTuple(args, ":Stamps") || next_stamp(self, &stamp))
        return NULL;
    return PyLong_FromLongLong(stamp);
}

static PyObject *stamps_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "clock", NULL};
    PyObject *clock = Py_None;
    long long slot;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L|O:Stamps", names, &slot, &clock))
        return NULL;
    Stamps *self = (Stamps *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->slot = (slot % SLOTS + SLOTS) % SLOTS;
    self->clock = Py_NewRef(clock);
    return (PyObject *)self;
}

static int stamps_traverse(Stamps *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->clock);
    return 0;
}

static void stamps_dealloc(Stamps *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(self->clock);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMemberDef stamps_members[] = {
    {"slot", T_LONGLONG, offsetof(Stamps, slot), READONLY, NULL},
    {NULL},
};

static PyType_Slot stamps_slots[] = {
    {Py_tp_new, stamps_new},
    {Py_tp_call, stamps_call},
    {Py_tp_traverse, stamps_traverse},
    {Py_tp_dealloc, stamps_dealloc},
    {Py_tp_members, stamps_members},
    {0, NULL},
};

static PyType_Spec stamps_spec = {
    .name = "celery_influx._speedups.Stamps",
    .basicsize = sizeof(Stamps),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = stamps_slots,
};

/* -- a point ------------------------------------------------------------------------------------- */

/* A short name, with what was written for it. It is the very object that is known, since a str does
not change; and it is kept, so that no other one has its address. A field has a type, too, by the
types of its measurement's fields: of these no one ever changes. */
typedef struct {
    PyObject *name;
    PyObject *types, *kind; /* NULL, but a field's */
    unsigned char of, length;
    char text[22];
} Known;

#define KNOWN 128 /* a power of two */

typedef struct {
    PyObject_HEAD
    PyObject *constant;      /* dict of the constant tags */
    PyObject *constant_text; /* bytes: the same, escaped */
    PyObject *clock;         /* callable or None */
    PyObject *on_left_out;   /* callable or None */
    PyObject *encode;        /* the Python encoder */
    PyObject *slow;          /* its way for what is rare, for a point whose clock has been asked */
    PyObject *types;         /* FieldTypes' dict of measurement to field to type, or None */
    Stamps *stamps;          /* the clock, where it is one of these; else NULL */
    long long unit;
    Known known[KNOWN]; /* each at one of the two places to which its address leads */
} Encoder;

static inline int is_known(const Known *known, PyObject *name, int of, PyObject *types)
{
    return known->name == name && known->of == of && known->types == types;
}

static inline Known *place_of(Encoder *self, PyObject *name, PyObject *types, int shift)
{
    uint64_t address = (uintptr_t)name ^ (uintptr_t)types;
    return &self->known[address * 0x9e3779b97f4a7c15 >> shift & (KNOWN - 1)];
}
#define ONE_PLACE 57
#define OTHER_PLACE 44

/* Where it is, if it is known; else where it is to be. */
static inline Known *known_as(Encoder *self, PyObject *name, int of, PyObject *types)
{
    Known *other = place_of(self, name, types, OTHER_PLACE);
    return is_known(other, name, of, types) ? other : place_of(self, name, types, ONE_PLACE);
}

/* Where there is room for the longest; where it ends. */
static inline char *put_known(char *to, const Known *known)
{
    memcpy(to, known->text, sizeof known->text);
    return to + known->length;
}

/* A name that is not known, and may be wrong. */
static int put_new_name(Encoder *self, Line *line, PyObject *name, int of)
{
    if (!PyUnicode_CheckExact(name) || PyUnicode_GET_LENGTH(name) == 0)
        return RARE;
    if ((of == MEASUREMENT || of == FIELD) && PyUnicode_READ_CHAR(name, 0) == '_')
        return RARE; /* may be one of InfluxDB's own */
    if (of == TAG && PyDict_GET_SIZE(self->constant)) {
        int there = PyDict_Contains(self->constant, name);
        if (there)
            return there < 0 ? BROKEN : RARE; /* it stands in the other's place */
    }
    Py_ssize_t begin = line->length;
    int came = put_text(line, name, of);
    if (came == DONE && (of == TAG || of == FIELD) && line->length - begin == 4 &&
        memcmp(line->text + begin, "time", 4) == 0)
        return RARE; /* InfluxDB's own column */
    return came;
}

/* Who is there goes to its other place, and from there whoever was, for good: so of few names each
soon has a place of its own. */
static void make_way(Encoder *self, Known *known)
{
    if (known->name == NULL)
        return;
    Known *other = place_of(self, known->name, known->types, OTHER_PLACE);
    if (other == known)
        other = place_of(self, known->name, known->types, ONE_PLACE);
    Py_XDECREF(other->name);
    Py_XDECREF(other->types);
    *other = *known;
}

/* One that is not known, and then is, if it is short. */
static int put_and_know(
    Encoder *self, Line *line, Known *known, PyObject *name, int of, PyObject *types, PyObject *kind)
{
    Py_ssize_t begin = line->length;
    int came = put_new_name(self, line, name, of);
    Py_ssize_t length = line->length - begin;
    if (came == DONE && length <= (Py_ssize_t)sizeof known->text) {
        make_way(self, known);
        known->name = Py_NewRef(name);
        known->types = Py_XNewRef(types);
        known->kind = kind;
        known->of = (unsigned char)of;
        known->length = (unsigned char)length;
        memcpy(known->text, line->text + begin, (size_t)length);
    }
    return came;
}

static int put_name(Encoder *self, Line *line, PyObject *name, int of)
{
    Known *known = known_as(self, name, of, NULL);
    if (line_room(line, sizeof known->text))
        return BROKEN;
    if (!is_known(known, name, of, NULL))
        return put_and_know(self, line, known, name, of, NULL, NULL);
    line->length = put_known(line->text + line->length, known) - line->text;
    return DONE;
}

static int put_tag_value(Encoder *self, Line *line, PyObject *value)
{
    if (PyUnicode_CheckExact(value))
        return put_name(self, line, value, LABEL);
    if (line_room(line, LONGEST_NUMBER))
        return BROKEN;
    if (PyBool_Check(value)) {
        put_bytes(line, value == Py_True ? "True" : "False", value == Py_True ? 4 : 5);
        return DONE;
    }
    if (PyLong_CheckExact(value)) {
        int overflow;
        long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow)
            return RARE;
        put_integer(line, number);
        return DONE;
    }
    if (PyFloat_CheckExact(value) && Py_IS_FINITE(PyFloat_AS_DOUBLE(value)))
        return put_float(line, PyFloat_AS_DOUBLE(value));
    return RARE;
}

static int put_tags(Encoder *self, Line *line, PyObject *tags)
{
    Py_ssize_t place = 0, left = PyDict_GET_SIZE(tags);
    PyObject *key, *value;
    while (left-- > 0 && PyDict_Next(tags, &place, &key, &value)) {
        Py_ssize_t before = line->length;
        const Known *name = known_as(self, key, TAG, NULL);
        const Known *label = known_as(self, value, LABEL, NULL);
        if (line_room(line, 2 + 2 * sizeof name->text))
            return BROKEN;
        if (is_known(name, key, TAG, NULL) && is_known(label, value, LABEL, NULL)) {
            char *to = line->text + before;
            *to++ = ',';
            to = put_known(to, name);
            *to++ = '=';
            line->length = put_known(to, label) - line->text;
            continue;
        }
        put(line, ',');
        int came = put_name(self, line, key, TAG);
        if (came)
            return came;
        if (value == Py_None || (PyUnicode_CheckExact(value) && is_empty(value))) {
            line->length = before;
            continue;
        }
        if (line_room(line, 1))
            return BROKEN;
        put(line, '=');
        came = put_tag_value(self, line, value);
        if (came)
            return came;
    }
    return DONE;
}

/* `types`: those that the fields have, or NULL, where they may have any. */
static int put_fields(
    Encoder *self, Line *line, PyObject *fields, PyObject *types, Py_ssize_t *left_out)
{
    Py_ssize_t place = 0, left = PyDict_GET_SIZE(fields);
    PyObject *key, *value, *kind;
    char separator = ' ';
    int came;
    while (left-- > 0 && PyDict_Next(fields, &place, &key, &value)) {
        Py_ssize_t before = line->length;
        if (before > MAX_LENGTH)
            return RARE;
        Known *name = known_as(self, key, FIELD, types);
        int known = is_known(name, key, FIELD, types);
        PyObject *given = (PyObject *)Py_TYPE(value);
        if (types == NULL)
            kind = given;
        else if (known)
            kind = name->kind;
        else if (PyUnicode_CheckExact(key))
            kind = PyDict_GetItemWithError(types, key);
        else
            return RARE;
        int widened = kind == (PyObject *)&PyFloat_Type && given == (PyObject *)&PyLong_Type;
        if (kind != given && !widened)
            return PyErr_Occurred() ? BROKEN : RARE;
        if (line_room(line, 1 + sizeof name->text + 1 + LONGEST_NUMBER + 1))
            return BROKEN;
        if (known) {
            char *to = line->text + before;
            *to++ = separator;
            to = put_known(to, name);
            *to++ = '=';
            line->length = to - line->text;
        } else {
            put(line, separator);
            came = put_and_know(self, line, name, key, FIELD, types, kind);
            if (came)
                return came;
            if (line_room(line, 1 + LONGEST_NUMBER + 1))
                return BROKEN;
            put(line, '=');
        }
        if (PyFloat_CheckExact(value)) {
            if (!Py_IS_FINITE(PyFloat_AS_DOUBLE(value))) {
                *left_out += 1;
                line->length = before;
                continue;
            }
            came = put_float(line, PyFloat_AS_DOUBLE(value));
        } else if (PyBool_Check(value)) {
            put_bytes(line, value == Py_True ? "true" : "false", value == Py_True ? 4 : 5);
        } else if (PyLong_CheckExact(value)) {
            int overflow;
            long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
            if (overflow)
                return RARE;
            if (widened) {
                came = put_float(line, (double)number);
            } else {
                put_integer(line, number);
                put(line, 'i');
            }
        } else if (PyUnicode_CheckExact(value)) {
            put(line, '"');
            came = put_text(line, value, VALUE);
            if (came == DONE) {
                if (line_room(line, 1))
                    return BROKEN;
                put(line, '"');
            }
        } else {
            return RARE;
        }
        if (came)
            return came;
        separator = ',';
    }
    return separator == ',' ? DONE : RARE;
}

/* The line without its time. */
static int put_point(
    Encoder *self, Line *line, PyObject *measurement, PyObject *fields, PyObject *tags,
    Py_ssize_t *left_out)
{
    int came;
    if (!PyUnicode_CheckExact(measurement) || !PyDict_CheckExact(fields) ||
        !(tags == Py_None || PyDict_CheckExact(tags)))
        return RARE;
    came = put_name(self, line, measurement, MEASUREMENT);
    if (came)
        return came;
    Py_ssize_t size = PyBytes_GET_SIZE(self->constant_text);
    if (line_room(line, size))
        return BROKEN;
    put_bytes(line, PyBytes_AS_STRING(self->constant_text), size);
    if (tags != Py_None) {
        came = put_tags(self, line, tags);
        if (came)
            return came;
    }
    PyObject *types = NULL;
    if (self->types != Py_None) {
        types = PyDict_GetItemWithError(self->types, measurement);
        if (types == NULL)
            return PyErr_Occurred() ? BROKEN : RARE;
    }
    return put_fields(self, line, fields, types, left_out);
}

/* The time, rounded down to the encoder's unit. */
static int put_ns(Encoder *self, Line *line, long long time)
{
    long long rest = time % self->unit;
    long long ticks = time / self->unit - (rest < 0);
    /* Rounded down it must not be before the first time there is. */
    if (time > MAX_TIME || ticks < MIN_TIME / self->unit)
        return RARE;
    if (line_room(line, 1 + LONGEST_NUMBER))
        return BROKEN;
    put(line, ' ');
    put_integer(line, ticks);
    return DONE;
}

static int put_time(Encoder *self, Line *line, PyObject *timestamp)
{
    int overflow;
    if (!PyLong_CheckExact(timestamp))
        return RARE;
    long long time = PyLong_AsLongLongAndOverflow(timestamp, &overflow);
    return overflow ? RARE : put_ns(self, line, time);
}

/* The line of a point, and the time that it has or is given. `way`: who has the word if it is RARE. */
static int put_all(Encoder *self, Line *line, PyObject *point, Py_ssize_t *left_out, PyObject **way)
{
    *way = self->encode;
    if (!PyTuple_Check(point) || Py_TYPE(point)->tp_iter != PyTuple_Type.tp_iter ||
        PyTuple_GET_SIZE(point) != 4)
        return RARE;
    int came = put_point(
        self, line, PyTuple_GET_ITEM(point, 0), PyTuple_GET_ITEM(point, 1),
        PyTuple_GET_ITEM(point, 2), left_out);
    if (came == DONE && line->length > MAX_LENGTH - LONGEST_NUMBER)
        came = RARE; /* it may become too long */
    PyObject *timestamp = PyTuple_GET_ITEM(point, 3);
    if (came == DONE && timestamp != Py_None) {
        came = put_time(self, line, timestamp);
    } else if (came == DONE && self->stamps != NULL && self->stamps->clock == Py_None) {
        long long now;
        next_stamp(self->stamps, &now);
        came = put_ns(self, line, now);
    } else if (came == DONE && self->clock != Py_None) {
        *way = self->slow; /* for `encode` would ask the clock again */
        PyObject *now = PyObject_CallNoArgs(self->clock);
        if (now != NULL) {
            came = now == Py_None ? DONE : put_time(self, line, now);
            Py_DECREF(now);
        } else if (
            PyErr_ExceptionMatches(PyExc_RuntimeError) || PyErr_ExceptionMatches(PyExc_TypeError) ||
            PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) {
            PyErr_Clear();
            came = RARE;
        } else {
            came = BROKEN;
        }
    }
    return came;
}

static PyObject *encode(PyObject *arg, PyObject *point)
{
    Encoder *self = (Encoder *)arg;
    Line line;
    Py_ssize_t left_out = 0;
    PyObject *result = NULL, *way;

    line_begin(&line);
    int came = put_all(self, &line, point, &left_out, &way);
    if (came == DONE)
        result = PyBytes_FromStringAndSize(line.text, line.length);
    line_end(&line);
    if (came == RARE)
        return PyObject_CallOneArg(way, point);
    if (result != NULL && left_out && self->on_left_out != Py_None) {
        PyObject *none = PyObject_CallFunction(self->on_left_out, "n", left_out);
        if (none == NULL)
            Py_CLEAR(result);
        Py_XDECREF(none);
    }
    return result;
}

static int encoder_traverse(Encoder *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->constant);
    Py_VISIT(self->clock);
    Py_VISIT(self->on_left_out);
    Py_VISIT(self->encode);
    Py_VISIT(self->slow);
    Py_VISIT(self->types);
    return 0;
}

static void encoder_dealloc(Encoder *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(self->constant);
    Py_XDECREF(self->constant_text);
    Py_XDECREF(self->clock);
    Py_XDECREF(self->on_left_out);
    Py_XDECREF(self->encode);
    Py_XDECREF(self->slow);
    Py_XDECREF(self->types);
    for (int i = 0; i < KNOWN; i++) {
        Py_XDECREF(self->known[i].name);
        Py_XDECREF(self->known[i].types);
    }
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyType_Slot encoder_slots[] = {
    {Py_tp_traverse, encoder_traverse},
    {Py_tp_dealloc, encoder_dealloc},
    {0, NULL},
};

static PyType_Spec encoder_spec = {
    .name = "celery_influx._speedups.Encoder",
    .basicsize = sizeof(Encoder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = encoder_slots,
};

static PyMethodDef encode_def = {
    "encode", encode, METH_O, "One line for a point, as line_protocol.Encoder's encode."};

/* -- the buffer ---------------------------------------------------------------------------------- */

/* What is taken at once: joined by newlines, as it is sent; a line by itself is made when somebody
asks for it. */
typedef struct {
    PyObject_VAR_HEAD
    PyObject *joined; /* bytes */
    Py_ssize_t ends[]; /* of each line in it */
} Lines;

static Py_ssize_t lines_length(Lines *self)
{
    return Py_SIZE(self);
}

static PyObject *lines_item(Lines *self, Py_ssize_t number)
{
    if (number < 0 || number >= Py_SIZE(self)) {
        PyErr_SetString(PyExc_IndexError, "no such line");
        return NULL;
    }
    Py_ssize_t begin = number ? self->ends[number - 1] + 1 : 0;
    return PyBytes_FromStringAndSize(
        PyBytes_AS_STRING(self->joined) + begin, self->ends[number] - begin);
}

/* As a list of them. */
static PyObject *lines_compare(PyObject *self, PyObject *other, int how)
{
    if (!PyList_CheckExact(other))
        Py_RETURN_NOTIMPLEMENTED;
    PyObject *list = PySequence_List(self);
    PyObject *found = list == NULL ? NULL : PyObject_RichCompare(list, other, how);
    Py_XDECREF(list);
    return found;
}

static void lines_dealloc(Lines *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->joined);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMemberDef lines_members[] = {
    {"joined", T_OBJECT_EX, offsetof(Lines, joined), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot lines_slots[] = {
    {Py_sq_length, lines_length},
    {Py_sq_item, lines_item},
    {Py_tp_richcompare, lines_compare},
    {Py_tp_hash, PyObject_HashNotImplemented},
    {Py_tp_members, lines_members},
    {Py_tp_dealloc, lines_dealloc},
    {0, NULL},
};

static PyType_Spec lines_spec = {
    .name = "celery_influx._speedups.Lines",
    .basicsize = offsetof(Lines, ends),
    .itemsize = sizeof(Py_ssize_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = lines_slots,
};

/* Lines one after the other, each with its length before it, in pieces of memory: less to touch,
to take and to give back than an object for each. Nothing in it runs Python code, so the
interpreter's lock is enough of one, and a signal's handler or finaliser never comes in between. */
typedef struct Piece {
    struct Piece *next;
    Py_ssize_t size, end;
    char text[];
} Piece;

#define PIECE (65536 - (Py_ssize_t)sizeof(Piece))
#define LENGTH ((Py_ssize_t)sizeof(Py_ssize_t))

typedef struct {
    PyObject_HEAD
    Piece *first, *last;     /* NULL: there is none yet */
    Py_ssize_t start, count; /* where in the first piece the lines begin */
    int called; /* somebody was, to take, and has not yet: once is enough */
    long long max_lines, max_bytes, bytes, put_lines, taken, dropped;
} Buffer;

/* The line at a place, where there is one; the place is then the next one's. */
static const char *line_at(Piece **piece, Py_ssize_t *place, Py_ssize_t *length)
{
    if (*place == (*piece)->end) {
        *piece = (*piece)->next;
        *place = 0;
    }
    const char *text = (*piece)->text + *place;
    memcpy(length, text, sizeof *length);
    *place += LENGTH + *length;
    return text + LENGTH;
}

/* The oldest line goes. Empty, the buffer keeps one piece of what a burst has made of it. */
static void buffer_pop(Buffer *self)
{
    Piece *first = self->first;
    Py_ssize_t length;
    line_at(&self->first, &self->start, &length);
    if (self->first != first)
        PyMem_Free(first);
    self->bytes -= length + 1;
    self->count -= 1;
    if (self->count)
        return;
    self->start = self->first->end = 0;
    if (self->first->size > PIECE) {
        PyMem_Free(self->first);
        self->first = self->last = NULL;
    }
}

/* -1 with MemoryError set. */
static int buffer_append(Buffer *self, const char *text, Py_ssize_t length)
{
    Piece *last = self->last;
    if (last == NULL || last->size - last->end < LENGTH + length) {
        Py_ssize_t size = Py_MAX(PIECE, LENGTH + length);
        Piece *piece = PyMem_Malloc(sizeof *piece + (size_t)size);
        if (piece == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        piece->next = NULL;
        piece->size = size;
        piece->end = 0;
        *(last == NULL ? &self->first : &last->next) = piece;
        self->last = last = piece;
    }
    memcpy(last->text + last->end, &length, sizeof length);
    memcpy(last->text + last->end + LENGTH, text, (size_t)length);
    last->end += LENGTH + length;
    self->count += 1;
    self->bytes += length + 1;
    self->put_lines += 1;
    return 0;
}

/* Down to the limits, the oldest first; how many had to go. */
static Py_ssize_t buffer_limit(Buffer *self)
{
    Py_ssize_t dropped = 0;
    while (self->count && (self->bytes > self->max_bytes || self->count > self->max_lines)) {
        buffer_pop(self);
        dropped += 1;
    }
    self->dropped += dropped;
    return dropped;
}

static PyObject *buffer_put(Buffer *self, PyObject *lines)
{
    PyObject *found = PySequence_Fast(lines, "expected a sequence of bytes");
    if (found == NULL)
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(found), dropped = 0;
    int wrong = 0;
    for (Py_ssize_t i = 0; i < count && !wrong; i++) {
        PyObject *line = PySequence_Fast_GET_ITEM(found, i);
        if (!PyBytes_CheckExact(line)) {
            PyErr_SetString(PyExc_TypeError, "expected bytes");
            wrong = 1;
        } else if (buffer_append(self, PyBytes_AS_STRING(line), PyBytes_GET_SIZE(line))) {
            PyErr_Clear(); /* no memory: no room for it either, and to be counted so */
            self->put_lines += 1;
            self->dropped += 1;
            dropped += 1;
        }
    }
    dropped += buffer_limit(self);
    Py_DECREF(found);
    return wrong ? NULL : PyLong_FromSsize_t(dropped);
}

static PyObject *buffer_take(Buffer *self, PyObject *const *args, Py_ssize_t given)
{
    if (given != 2) {
        PyErr_SetString(PyExc_TypeError, "expected max_lines, max_bytes");
        return NULL;
    }
    long long max_lines = PyLong_AsLongLong(args[0]), room = PyLong_AsLongLong(args[1]) + 1;
    if (PyErr_Occurred())
        return NULL;
    /* All that is to be had of memory before a line goes; first what may collect some, and so run
    a finaliser that puts lines. */
    PyObject *answer = PyTuple_New(2);
    if (answer == NULL)
        return NULL;
    Piece *piece = self->first;
    Py_ssize_t place = self->start, length, seen = 0, count = 0, size = 0;
    while (seen < self->count && count < max_lines) {
        line_at(&piece, &place, &length);
        if (length < room - size) {
            size += length + 1;
            count += 1;
        } else if (length < room) {
            break;
        }
        seen += 1;
    }
    State *state = PyType_GetModuleState(Py_TYPE(self));
    Lines *taken = (Lines *)state->lines->tp_alloc(state->lines, count);
    PyObject *too_long = PyLong_FromSsize_t(seen - count);
    if (taken != NULL)
        taken->joined = PyBytes_FromStringAndSize(NULL, size - (size > 0));
    if (taken == NULL || taken->joined == NULL || too_long == NULL) {
        Py_XDECREF(taken);
        Py_XDECREF(too_long);
        Py_DECREF(answer);
        return NULL;
    }
    char *joined = PyBytes_AS_STRING(taken->joined);
    Py_ssize_t end = 0, number = 0;
    for (Py_ssize_t i = 0; i < seen; i++) {
        piece = self->first;
        place = self->start;
        const char *text = line_at(&piece, &place, &length);
        if (length < room) {
            memcpy(joined + end, text, (size_t)length);
            end += length;
            taken->ends[number++] = end;
            if (number < count)
                joined[end++] = '\n';
        }
        buffer_pop(self);
    }
    self->taken += seen;
    self->called = 0;
    PyTuple_SET_ITEM(answer, 0, (PyObject *)taken);
    PyTuple_SET_ITEM(answer, 1, too_long);
    return answer;
}

static PyObject *buffer_clear(Buffer *self, PyObject *none)
{
    Py_ssize_t dropped = self->count;
    while (self->count)
        buffer_pop(self);
    self->dropped += dropped;
    self->called = 0;
    return PyLong_FromSsize_t(dropped);
}

static Py_ssize_t buffer_length(Buffer *self)
{
    return self->count;
}

static PyObject *buffer_repr(Buffer *self)
{
    return PyUnicode_FromFormat(
        "<Buffer lines=%zd/%lld bytes=%lld/%lld>", self->count, self->max_lines, self->bytes,
        self->max_bytes);
}

static PyObject *buffer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"max_lines", "max_bytes", NULL};
    long long max_lines, max_bytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LL:Buffer", names, &max_lines, &max_bytes))
        return NULL;
    Buffer *self = (Buffer *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->max_lines = max_lines;
    self->max_bytes = max_bytes;
    return (PyObject *)self;
}

static void buffer_dealloc(Buffer *self)
{
    PyTypeObject *type = Py_TYPE(self);
    while (self->count)
        buffer_pop(self);
    PyMem_Free(self->first);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMemberDef buffer_members[] = {
    {"max_lines", T_LONGLONG, offsetof(Buffer, max_lines), READONLY, NULL},
    {"max_bytes", T_LONGLONG, offsetof(Buffer, max_bytes), READONLY, NULL},
    {"bytes", T_LONGLONG, offsetof(Buffer, bytes), READONLY, NULL},
    {"put_lines", T_LONGLONG, offsetof(Buffer, put_lines), READONLY, NULL},
    {"taken", T_LONGLONG, offsetof(Buffer, taken), READONLY, NULL},
    {"dropped", T_LONGLONG, offsetof(Buffer, dropped), READONLY, NULL},
    {NULL},
};

static PyMethodDef buffer_methods[] = {
    {"put", (PyCFunction)buffer_put, METH_O, "put(lines): how many old ones were dropped for them."},
    {"take", (PyCFunction)(void (*)(void))buffer_take, METH_FASTCALL,
     "take(max_lines, max_bytes): lines, too long."},
    {"clear", (PyCFunction)buffer_clear, METH_NOARGS, "clear(): how many lines were dropped."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot buffer_slots[] = {
    {Py_tp_new, buffer_new},
    {Py_tp_dealloc, buffer_dealloc},
    {Py_tp_repr, buffer_repr},
    {Py_tp_members, buffer_members},
    {Py_tp_methods, buffer_methods},
    {Py_sq_length, buffer_length},
    {0, NULL},
};

static PyType_Spec buffer_spec = {
    .name = "celery_influx._speedups.Buffer",
    .basicsize = sizeof(Buffer),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = buffer_slots,
};

/* -- relay.py's frames of lines --------------------------------------------------------------- */

/* As in relay.py, which says more. */
#define HEADER 4
#define LONGEST_FRAME 4096
enum { LINE_FRAME = 0, START_FRAME = 2, END_FRAME = 3 };

/* Whether it was written, by one call, and so whole. The pipe never makes its writers wait. `head`:
the beginning of the body. */
static int write_frame(
    int pipe, int kind, int database, const void *head, Py_ssize_t head_length, const char *text,
    Py_ssize_t length)
{
    char frame[LONGEST_FRAME];
    Py_ssize_t body = head_length + length;
    if (body > LONGEST_FRAME - HEADER)
        return 0;
    frame[0] = (char)(body & 255);
    frame[1] = (char)(body >> 8);
    frame[2] = (char)kind;
    frame[3] = (char)database;
    memcpy(frame + HEADER, head, (size_t)head_length);
    memcpy(frame + HEADER + head_length, text, (size_t)length);
    return write(pipe, frame, (size_t)body + HEADER) == body + HEADER;
}

/* The bodies of those frames of lines that follow each other at a place and are of one database. */
static PyObject *take_lines(PyObject *module, PyObject *args)
{
    PyObject *data;
    Py_ssize_t position;
    if (!PyArg_ParseTuple(args, "Sn:take_lines", &data, &position))
        return NULL;
    const unsigned char *text = (const unsigned char *)PyBytes_AS_STRING(data);
    Py_ssize_t end = PyBytes_GET_SIZE(data);
    if (position < 0) {
        PyErr_SetString(PyExc_ValueError, "expected a position in the data");
        return NULL;
    }
    int database = end - position >= HEADER ? text[position + 3] : 0;
    PyObject *lines = PyList_New(0);
    while (lines != NULL && end - position >= HEADER) {
        const unsigned char *head = text + position;
        Py_ssize_t length = head[0] | head[1] << 8;
        if (head[2] != LINE_FRAME || head[3] != database || end - position < HEADER + length)
            break;
        PyObject *line = PyBytes_FromStringAndSize((const char *)head + HEADER, length);
        if (line == NULL || PyList_Append(lines, line))
            Py_CLEAR(lines);
        Py_XDECREF(line);
        position += HEADER + length;
    }
    return lines == NULL ? NULL : Py_BuildValue("niN", position, database, lines);
}

/* -- from a point to the buffer ------------------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    PyObject *encoder; /* an Encoder, whose clock is a Stamps */
    PyObject *buffer;  /* or NULL, where lines go through the relay */
    PyObject *send;    /* the Python way */
    /* With a buffer: called with the number of lines dropped, where there are, or a batch is due.
    With the relay: called with a line that its pipe did not take at once; whether it did then. */
    PyObject *wake;
    PyObject *handler_of; /* of a signal, or NULL with a buffer */
    Py_buffer points;
    long long due_lines, due_bytes;
    int pipe, database;
    int refused; /* the last one, by Python too: it knows when one gets through again */
} Sender;

/* Whether the process lives on after a write to a pipe that nobody reads; -1 with an exception. */
static int survives(Sender *self)
{
    PyObject *number = PyLong_FromLong(SIGPIPE);
    PyObject *handler = number == NULL ? NULL : PyObject_CallOneArg(self->handler_of, number);
    Py_XDECREF(number);
    if (handler == NULL)
        return -1;
    int lives = !PyLong_CheckExact(handler) || PyLong_AsLong(handler) != 0; /* SIG_DFL */
    Py_DECREF(handler);
    return lives;
}

static int write_line(const Sender *self, const Line *line)
{
    return write_frame(
        self->pipe, LINE_FRAME, self->database, "", 0, line->text, line->length);
}

static PyObject *write_point(Sender *self, const Line *line, PyObject *point)
{
    int lives = survives(self);
    if (lives < 0)
        return NULL;
    if (lives && !self->refused && write_line(self, line)) {
        *(uint64_t *)self->points.buf += 1;
        Py_RETURN_NONE;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(line->text, line->length);
    if (bytes == NULL) {
        PyErr_Clear(); /* no memory: as in send_point */
        return PyObject_CallOneArg(self->send, point);
    }
    PyObject *taken = PyObject_CallOneArg(self->wake, bytes);
    Py_DECREF(bytes);
    self->refused = taken != Py_True;
    if (taken == NULL)
        return NULL;
    Py_DECREF(taken);
    Py_RETURN_NONE;
}

/* Its buffer has a point's line more. */
static PyObject *buffer_grown(Sender *self)
{
    Buffer *buffer = (Buffer *)self->buffer;
    *(uint64_t *)self->points.buf += 1;
    Py_ssize_t dropped = buffer_limit(buffer);
    int due = !buffer->called &&
              (buffer->bytes >= self->due_bytes || buffer->count >= self->due_lines);
    if (!dropped && !due)
        Py_RETURN_NONE;
    buffer->called |= due;
    PyObject *none = PyObject_CallFunction(self->wake, "n", dropped);
    if (none == NULL)
        buffer->called = 0;
    return none;
}

static PyObject *send_point(PyObject *arg, PyObject *point)
{
    Sender *self = (Sender *)arg;
    Encoder *encoder = (Encoder *)self->encoder;
    Line line;
    Py_ssize_t left_out = 0;
    PyObject *way;

    line_begin(&line);
    int came = put_all(encoder, &line, point, &left_out, &way);
    int quick = came == DONE && !left_out;
    if (quick && self->buffer == NULL) {
        PyObject *none = write_point(self, &line, point);
        line_end(&line);
        return none;
    }
    if (quick && buffer_append((Buffer *)self->buffer, line.text, line.length))
        came = BROKEN;
    line_end(&line);
    if (quick && came == DONE)
        return buffer_grown(self);
    if (came == BROKEN)
        PyErr_Clear(); /* no memory: Python meets it again, and counts it */
    return PyObject_CallOneArg(self->send, point);
}

static int sender_traverse(Sender *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->encoder);
    Py_VISIT(self->buffer);
    Py_VISIT(self->send);
    Py_VISIT(self->wake);
    Py_VISIT(self->handler_of);
    /* Not points.obj: a memoryview that is taken apart together with us, and before, must not be
    released; and none leads back here. */
    return 0;
}

static void sender_dealloc(Sender *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(self->encoder);
    Py_XDECREF(self->buffer);
    Py_XDECREF(self->send);
    Py_XDECREF(self->wake);
    Py_XDECREF(self->handler_of);
    PyBuffer_Release(&self->points);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyType_Slot sender_slots[] = {
    {Py_tp_traverse, sender_traverse},
    {Py_tp_dealloc, sender_dealloc},
    {0, NULL},
};

static PyType_Spec sender_spec = {
    .name = "celery_influx._speedups.Sender",
    .basicsize = sizeof(Sender),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = sender_slots,
};

static PyMethodDef send_def = {"send", send_point, METH_O, "Queue a point, as Database's _send."};

/* -- database.py's `send_data` ------------------------------------------------------------------- */

/* A method around a function of Python's: of one plain Point it does in C what that would. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *function, *dict, *weak;
    PyTypeObject *point;       /* the class */
    PyMemberDescrObject *slot; /* of who has the method: what takes a Point */
} Method;

static PyObject *
method_call(PyObject *called, PyObject *const *args, size_t flags, PyObject *named)
{
    Method *self = (Method *)called;
    if (PyVectorcall_NARGS(flags) == 2 && named == NULL && Py_TYPE(args[1]) == self->point &&
        PyObject_TypeCheck(args[0], PyDescr_TYPE(self->slot))) {
        PyObject *accept = *(PyObject **)((char *)args[0] + self->slot->d_member->offset);
        if (accept != NULL && PyCFunction_Check(accept) &&
            PyCFunction_GET_FUNCTION(accept) == send_point) {
            Py_INCREF(accept); /* whoever is called may put another there */
            PyObject *none = send_point(PyCFunction_GET_SELF(accept), args[1]);
            Py_DECREF(accept);
            return none;
        }
    }
    return PyObject_Vectorcall(self->function, args, flags, named);
}

static PyObject *method_get(PyObject *self, PyObject *object, PyObject *type)
{
    return object == NULL ? Py_NewRef(self) : PyMethod_New(self, object);
}

static int method_traverse(Method *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->function);
    Py_VISIT(self->dict);
    Py_VISIT(self->point);
    Py_VISIT(self->slot);
    return 0;
}

static int method_clear(Method *self)
{
    Py_CLEAR(self->dict);
    return 0;
}

static void method_dealloc(Method *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->weak != NULL)
        PyObject_ClearWeakRefs((PyObject *)self);
    Py_XDECREF(self->function);
    Py_XDECREF(self->dict);
    Py_XDECREF(self->point);
    Py_XDECREF(self->slot);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMemberDef method_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Method, call), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(Method, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Method, weak), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef method_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot method_slots[] = {
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, method_get},
    {Py_tp_members, method_members},
    {Py_tp_getset, method_getset},
    {Py_tp_traverse, method_traverse},
    {Py_tp_clear, method_clear},
    {Py_tp_dealloc, method_dealloc},
    {0, NULL},
};

static PyType_Spec method_spec = {
    .name = "celery_influx._speedups.Method",
    .basicsize = sizeof(Method),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
             Py_TPFLAGS_METHOD_DESCRIPTOR | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = method_slots,
};

static PyObject *method(PyObject *module, PyObject *args)
{
    State *state = PyModule_GetState(module);
    PyObject *function, *point, *slot;
    if (!PyArg_ParseTuple(
            args, "O!O!O!:method", &PyFunction_Type, &function, &PyType_Type, &point,
            &PyMemberDescr_Type, &slot))
        return NULL;
    if (((PyMemberDescrObject *)slot)->d_member->type != T_OBJECT_EX) {
        PyErr_SetString(PyExc_TypeError, "expected a slot that holds an object");
        return NULL;
    }
    Method *self = (Method *)state->method->tp_alloc(state->method, 0);
    if (self == NULL)
        return NULL;
    self->call = method_call;
    self->function = Py_NewRef(function);
    self->point = (PyTypeObject *)Py_NewRef(point);
    self->slot = (PyMemberDescrObject *)Py_NewRef(slot);
    return (PyObject *)self;
}

/* -- a run of a task ----------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *influx, *id, *facts, *request;
    long long began, clock, cpu_clock;
    char is_eager, over;
} Run;

static long long clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static Run *make_run(PyTypeObject *type, PyObject *const *given, long long began)
{
    Run *self = (Run *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->influx = Py_NewRef(given[0]);
    self->id = Py_NewRef(given[1]);
    self->facts = Py_NewRef(given[2]);
    self->began = began;
    return self;
}

static PyObject *run_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *given[3];
    long long began;
    if (!PyArg_ParseTuple(args, "OOOL:Run", given, given + 1, given + 2, &began))
        return NULL;
    return (PyObject *)make_run(type, given, began);
}

static PyObject *run_start(Run *self, PyObject *none)
{
    self->cpu_clock = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    self->clock = clock_ns(CLOCK_MONOTONIC);
    Py_RETURN_NONE;
}

static PyObject *run_stop(Run *self, PyObject *none)
{
    if (self->clock == 0)
        return Py_BuildValue("OO", Py_None, Py_None);
    long long runtime = clock_ns(CLOCK_MONOTONIC) - self->clock;
    return Py_BuildValue("LL", runtime, clock_ns(CLOCK_THREAD_CPUTIME_ID) - self->cpu_clock);
}

static int run_traverse(Run *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->influx);
    Py_VISIT(self->id);
    Py_VISIT(self->facts);
    Py_VISIT(self->request);
    return 0;
}

static int run_clear(Run *self)
{
    Py_CLEAR(self->influx);
    Py_CLEAR(self->id);
    Py_CLEAR(self->facts);
    Py_CLEAR(self->request);
    return 0;
}

static void run_dealloc(Run *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    run_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMemberDef run_members[] = {
    {"influx", T_OBJECT, offsetof(Run, influx), 0, NULL},
    {"id", T_OBJECT, offsetof(Run, id), 0, NULL},
    {"facts", T_OBJECT, offsetof(Run, facts), 0, NULL},
    {"request", T_OBJECT, offsetof(Run, request), 0, NULL},
    {"began", T_LONGLONG, offsetof(Run, began), 0, NULL},
    {"clock", T_LONGLONG, offsetof(Run, clock), 0, NULL},
    {"is_eager", T_BOOL, offsetof(Run, is_eager), 0, NULL},
    {"over", T_BOOL, offsetof(Run, over), 0, NULL},
    {NULL},
};

static PyMethodDef run_methods[] = {
    {"start", (PyCFunction)run_start, METH_NOARGS, "start(): its body starts now."},
    {"stop", (PyCFunction)run_stop, METH_NOARGS, "stop(): ns since, of the clock and of CPU."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot run_slots[] = {
    {Py_tp_new, run_new},         {Py_tp_traverse, run_traverse}, {Py_tp_clear, run_clear},
    {Py_tp_dealloc, run_dealloc}, {Py_tp_members, run_members},   {Py_tp_methods, run_methods},
    {0, NULL},
};

static PyType_Spec run_spec = {
    .name = "celery_influx._speedups.Run",
    .basicsize = sizeof(Run),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = run_slots,
};

/* A number's digits, up to what ends it; -1 where there are none, or too many. */
static long long digits(const char **text, char end)
{
    long long value = 0;
    const char *from = *text;
    for (; **text >= '0' && **text <= '9' && *text - from < 18; ++*text)
        value = 10 * value + **text - '0';
    if (**text >= '0' && **text <= '9' && value < MAX_TIME / 10)
        value = 10 * value + *(*text)++ - '0';
    return *text == from || *(*text)++ != end ? -1 : value;
}

/* signals.py's `_published`, of the last one; -1 where this is no header of ours. */
static long long published(PyObject *header)
{
    if (header == NULL || !PyUnicode_CheckExact(header) || !PyUnicode_IS_COMPACT_ASCII(header))
        return -1;
    const char *text = (const char *)PyUnicode_1BYTE_DATA(header);
    const char *end = text + PyUnicode_GET_LENGTH(header);
    if (*text++ != '1' || *text++ != ';')
        return -1;
    long long last = digits(&text, ';');
    return last < 0 || digits(&text, 0) < 0 || text != end + 1 ? -1 : last;
}

/* A text, or None where it is missing; no more than that. */
static PyObject *text_of(PyObject *dict, PyObject *name)
{
    PyObject *found = PyDict_GetItemWithError(dict, name);
    if (found == NULL)
        return PyErr_Occurred() ? NULL : Py_None;
    return found == Py_None || PyUnicode_CheckExact(found) ? found : NULL;
}

/* Whether it is missing, None, or what else stands for that. */
static int is_without(PyObject *dict, PyObject *name)
{
    PyObject *found = PyDict_GetItemWithError(dict, name);
    return (found == NULL && !PyErr_Occurred()) || found == Py_None || found == Py_False ||
           (found != NULL && PyLong_CheckExact(found) && PyObject_IsTrue(found) == 0) ||
           (found != NULL && PyUnicode_CheckExact(found) && PyUnicode_GET_LENGTH(found) == 0);
}

/* The run that signals.py's `_run_of` makes of an ordinary message: neither a retry nor an ETA, by
the default exchange, and with our header. RARE: of any other. */
static int make_ordinary(
    State *state, PyObject *influx, PyObject *id, PyObject *task, PyObject *marks, Run **run)
{
    PyObject **name = state->names;
    long long now = clock_ns(CLOCK_REALTIME);
    long long last = published(PyDict_GetItemWithError(marks, name[HEADER_NAME]));
    /* Ours, all three: memory may be collected in here, and a finaliser of anybody's run; and a key
    that is no plain str may do anything when it is compared. */
    PyObject *delivery = Py_XNewRef(PyDict_GetItemWithError(marks, name[DELIVERY_INFO]));
    PyObject *queue = NULL, *worker = NULL, *facts = NULL;
    if (last >= 0 && last <= now && delivery != NULL && PyDict_CheckExact(delivery) &&
        is_without(marks, name[ETA]) && is_without(marks, name[RETRIES]) &&
        is_without(marks, name[IS_EAGER]) && is_without(delivery, name[EXCHANGE]) &&
        (queue = Py_XNewRef(text_of(delivery, name[ROUTING_KEY]))) != NULL && queue != Py_None &&
        (worker = Py_XNewRef(text_of(marks, name[HOSTNAME]))) != NULL)
        facts = Py_BuildValue("(OOO)iLOO", task, queue, worker, 0, now - last, Py_None, Py_None);
    Py_XDECREF(delivery);
    Py_XDECREF(queue);
    Py_XDECREF(worker);
    if (facts == NULL)
        return PyErr_Occurred() ? BROKEN : RARE;
    PyObject *given[] = {influx, id, facts};
    *run = make_run(state->run, given, now);
    Py_DECREF(facts);
    return *run == NULL ? BROKEN : DONE;
}

/* -- the point of a run -------------------------------------------------------------------------- */

/* A name and a time in ns, as seconds. */
static void put_seconds(Line *line, const char *name, long long ns)
{
    put_bytes(line, name, (Py_ssize_t)strlen(name));
    put_integer(line, ns / 1000000000);
    put(line, '.');
    ns %= 1000000000;
    for (int i = 8; i >= 0; i--) {
        line->text[line->length + i] = (char)('0' + ns % 10);
        ns /= 10;
    }
    line->length += 9;
}

/* ns of an int; -1 of None; -2 with an exception set. */
static long long ns_of(PyObject *given)
{
    int overflow = 0;
    if (given == Py_None)
        return -1;
    long long ns = PyLong_Check(given) ? PyLong_AsLongLongAndOverflow(given, &overflow) : -1;
    if (ns >= 0 && !overflow)
        return ns;
    PyErr_SetString(PyExc_ValueError, "expected ns, as an int");
    return -2;
}

/* The line of a run's point; `cpu` may be unknown, -1. */
static int put_run(
    Line *line, PyObject *head, PyObject *facts, long long runtime, long long cpu, long long now,
    long long unit)
{
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(head, &length);
    if (text == NULL)
        return BROKEN;
    PyObject *const *fact = &PyTuple_GET_ITEM(facts, 0); /* series, retries, wait, age, ids */
    long long retries = PyLong_AsLongLong(fact[1]);
    if (retries == -1 && PyErr_Occurred())
        return BROKEN;
    long long wait = ns_of(fact[2]), age = ns_of(fact[3]);
    if (wait < -1 || age < -1 || line_room(line, length + 8 * LONGEST_NUMBER) != DONE)
        return BROKEN;
    put_bytes(line, text, length);
    put_seconds(line, "runtime=", runtime);
    put_bytes(line, ",retries=", 9);
    put_integer(line, retries);
    put(line, 'i');
    if (cpu >= 0)
        put_seconds(line, ",cpu=", cpu);
    if (wait >= 0)
        put_seconds(line, ",wait=", wait);
    if (age >= 0)
        put_seconds(line, ",age=", age);
    put(line, ' ');
    put_integer(line, now / unit - (now % unit < 0));
    return DONE;
}

/* task_points.py's run_line. */
static PyObject *run_line(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    State *state = PyModule_GetState(module);
    if (count != 6 || !PyUnicode_Check(args[0]) || !PyTuple_Check(args[1]) ||
        PyTuple_GET_SIZE(args[1]) != 5) {
        PyErr_SetString(PyExc_TypeError, "expected head, facts, runtime, cpu, stamps, unit");
        return NULL;
    }
    long long runtime = ns_of(args[2]), cpu = ns_of(args[3]), now;
    long long unit = PyLong_AsLongLong(args[5]);
    if (unit == -1 && PyErr_Occurred())
        return NULL;
    if (unit <= 0 || runtime == -1) {
        PyErr_SetString(PyExc_ValueError, "expected a unit of at least 1 ns, and a runtime");
        return NULL;
    }
    if (runtime < 0 || cpu < -1)
        return NULL;
    if (Py_TYPE(args[4]) == state->stamps ? next_stamp((Stamps *)args[4], &now)
                                          : ask(args[4], &now))
        return NULL;
    Line line;
    PyObject *result = NULL;
    line_begin(&line);
    if (put_run(&line, args[0], args[1], runtime, cpu, now, unit) == DONE)
        result = PyBytes_FromStringAndSize(line.text, line.length);
    line_end(&line);
    return result;
}

/* -- a run's start and end ----------------------------------------------------------------------- */

#if PY_VERSION_HEX < 0x030D0000
#define PyObject_GetOptionalAttr _PyObject_LookupAttr
#endif

/* What signals.py binds the two functions to; no Python code but what is named here is called by
them, so no signal's handler comes in the middle of what they do. */
enum { MODULE, RUNS, SLOW, TASKS, APP, GO_ON, PASSING, INIT_BOUND };
enum { AGAIN = SLOW + 1, ENDED, END_BOUND };

/* A new reference; NULL where there is none, or with an exception set where it raised one. */
static PyObject *get(PyObject *object, PyObject *name)
{
    PyObject *found = NULL;
    if (object != NULL)
        PyObject_GetOptionalAttr(object, name, &found);
    return found;
}

static PyObject *item(PyObject *dict, PyObject *key)
{
    int is_dict = dict != NULL && key != NULL && PyDict_CheckExact(dict);
    return is_dict ? PyDict_GetItemWithError(dict, key) : NULL;
}

/* A task's `request_stack.top`, without the Python that takes; NULL where that stack is not as we
know it. It is Celery's own, not public: so it is only looked at. */
static PyObject *top_of(PyObject *const *name, PyObject *task)
{
    PyObject *stack = get(task, name[REQUEST_STACK]), *local = get(stack, name[LOCAL]);
    PyObject *storage = get(local, name[STORAGE]), *who = get(local, name[IDENT]);
    PyObject *ident = who != NULL && PyCFunction_Check(who) ? PyObject_CallNoArgs(who) : NULL;
    PyObject *requests = item(item(storage, ident), name[STACK]), *top = NULL;
    if (requests != NULL && PyList_CheckExact(requests) && PyList_GET_SIZE(requests) > 0)
        top = Py_NewRef(PyList_GET_ITEM(requests, PyList_GET_SIZE(requests) - 1));
    Py_XDECREF(stack);
    Py_XDECREF(local);
    Py_XDECREF(storage);
    Py_XDECREF(who);
    Py_XDECREF(ident);
    return top;
}

/* What plugin.py's `Influx.quick` has: how the default database's lines go. */
typedef struct {
    PyObject *quick, *send;
    PyObject *database, *relay; /* borrowed from quick */
    Sender *sender;             /* from send; NULL: not by this module */
} Way;

static void find_way(State *state, PyObject *influx, Way *way)
{
    way->send = way->database = way->relay = NULL;
    way->sender = NULL;
    way->quick = get(influx, state->names[QUICK]);
    if (way->quick == NULL || !PyTuple_CheckExact(way->quick) || PyTuple_GET_SIZE(way->quick) != 2)
        return;
    way->database = PyTuple_GET_ITEM(way->quick, 0);
    way->relay = PyTuple_GET_ITEM(way->quick, 1);
    way->send = get(way->database, state->names[ACCEPT]);
    PyObject *bound =
        way->send != NULL && PyCFunction_Check(way->send) ? PyCFunction_GET_SELF(way->send) : NULL;
    if (bound != NULL && Py_TYPE(bound) == state->sender &&
        (((Sender *)bound)->buffer == NULL) == (way->relay != Py_None))
        way->sender = (Sender *)bound;
}

static void leave_way(Way *way)
{
    Py_XDECREF(way->quick);
    Py_XDECREF(way->send);
}

/* Whether the relay would write a frame at once, and so may we. */
static int is_open(PyObject *const *name, const Way *way)
{
    PyObject *owed = get(way->relay, name[OWED]), *impatient = get(way->relay, name[IMPATIENT]);
    int open = owed != NULL && PyBytes_CheckExact(owed) && PyBytes_GET_SIZE(owed) == 0 &&
               impatient == Py_False;
    Py_XDECREF(owed);
    Py_XDECREF(impatient);
    return open && survives(way->sender) == 1;
}

/* This process's, which the relay knows without asking the kernel; -1 with an exception set. */
static long long pid_of(PyObject *const *name, const Way *way)
{
    PyObject *pid = get(way->relay, name[PID]);
    long long found = pid == NULL ? -1 : PyLong_AsLongLong(pid);
    Py_XDECREF(pid);
    return found;
}

/* relay.py's `put_start` of runs.py's `start_frame`; whether it was written. */
static int write_start(PyObject *const *name, const Way *way, PyObject *task, const Run *run)
{
    PyObject *late = get(task, name[ACKS_LATE]);
    int goes_back = late == NULL ? -1 : PyObject_IsTrue(late);
    Py_XDECREF(late);
    long long pid = goes_back < 0 || !is_open(name, way) ? -1 : pid_of(name, way);
    if (pid < 0)
        return 0;
    PyObject *start = Py_BuildValue(
        "LOLOO", pid, run->id, run->began, run->facts, goes_back ? Py_True : Py_False);
    PyObject *body = start == NULL ? NULL : PyMarshal_WriteObjectToString(start, Py_MARSHAL_VERSION);
    int written = body != NULL && write_frame(
                                      way->sender->pipe, START_FRAME, 0, "", 0,
                                      PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body));
    Py_XDECREF(start);
    Py_XDECREF(body);
    return written;
}

/* An exception that was raised before: a user's own attribute may have done so, which is no harm to
the task; or a signal's handler, in there, which is the task's business. */
typedef struct {
    PyObject *kind, *value, *trace;
} Raised;

static void raised_take(Raised *raised)
{
    PyErr_Fetch(&raised->kind, &raised->value, &raised->trace);
}

static void raised_drop(Raised *raised)
{
    Py_XDECREF(raised->kind);
    Py_XDECREF(raised->value);
    Py_XDECREF(raised->trace);
}

static PyObject *raised_again(Raised *raised)
{
    PyErr_Restore(raised->kind, raised->value, raised->trace);
    return NULL;
}

/* ordinary.py's start; whether it is begun, or nothing is done yet. */
static int quick_begin(State *state, PyObject *const *bound, PyObject *id, PyObject *task)
{
    PyObject *const *name = state->names, *runs = bound[RUNS];
    PyObject *influx = get(bound[APP], name[INFLUX]), *number = PyLong_FromVoidPtr(task);
    PyObject *wanted = NULL, *request = NULL, *marks = NULL, *called = NULL;
    int known = item(bound[TASKS], number) == task, begun = 0;
    Way way;
    find_way(state, influx, &way);
    Run *run = NULL;
    Py_XDECREF(number);
    number = NULL;
    if (known && way.sender != NULL && (wanted = get(task, name[INFLUX])) != Py_False &&
        !PyErr_Occurred() && (request = top_of(name, task)) != NULL &&
        (marks = get(request, name[DICT])) != NULL && PyDict_CheckExact(marks) &&
        (called = get(task, name[CALLED])) != NULL && PyUnicode_CheckExact(called) &&
        (number = PyLong_FromVoidPtr(request)) != NULL && item(runs, number) == NULL &&
        !PyErr_Occurred() && make_ordinary(state, influx, id, called, marks, &run) == DONE) {
        run->request = Py_NewRef(request);
        if (PyDict_SetItem(runs, number, (PyObject *)run) == 0) {
            begun = way.relay == Py_None || write_start(name, &way, task, run);
            if (begun) {
                Py_DECREF(run_start(run, NULL));
            } else {
                Raised raised;
                raised_take(&raised);
                PyDict_DelItem(runs, number);
                raised_again(&raised);
            }
        }
    }
    Py_XDECREF(run);
    Py_XDECREF(number);
    Py_XDECREF(called);
    Py_XDECREF(marks);
    Py_XDECREF(request);
    Py_XDECREF(wanted);
    leave_way(&way);
    Py_XDECREF(influx);
    return begun;
}

/* A run starts: `task_id`, `task`. */
static PyObject *
on_task_init(PyObject *given, PyObject *const *args, Py_ssize_t count, PyObject *named)
{
    PyObject *const *bound = &PyTuple_GET_ITEM(given, 0);
    if (count == 2 && named == NULL &&
        quick_begin(PyModule_GetState(bound[MODULE]), bound, args[0], args[1]))
        return PyObject_Vectorcall(bound[GO_ON], args, (size_t)count, NULL);
    Raised raised;
    raised_take(&raised);
    PyObject *none = PyObject_Vectorcall(bound[SLOW], args, (size_t)count, named);
    if (none != NULL && raised.kind != NULL &&
        (PyErr_GivenExceptionMatches(raised.kind, bound[PASSING]) ||
         !PyErr_GivenExceptionMatches(raised.kind, PyExc_Exception))) {
        Py_DECREF(none);
        return raised_again(&raised);
    }
    raised_drop(&raised);
    return none;
}

/* The line of a successful run's point, and its time, made unique; whether it has one. */
static int put_success(State *state, const Way *way, const Run *run, Line *line)
{
    long long runtime = clock_ns(CLOCK_MONOTONIC) - run->clock;
    long long cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID) - run->cpu_clock, now;
    PyObject *facts = run->facts, *series = PyTuple_GET_ITEM(facts, 0);
    PyObject *heads = get(way->database, state->names[HEADS]);
    PyObject *which = PyTuple_Pack(3, series, state->names[SUCCESS], Py_None);
    PyObject *head = item(heads, which);
    Encoder *encoder = (Encoder *)way->sender->encoder;
    int made = head != NULL && PyUnicode_CheckExact(head) && PyUnicode_GET_LENGTH(head) > 0 &&
               PyTuple_GET_ITEM(facts, 4) == Py_None && runtime >= 0 && cpu >= 0 &&
               next_stamp(encoder->stamps, &now) == 0 &&
               put_run(line, head, facts, runtime, cpu, now, encoder->unit) == DONE;
    Py_XDECREF(heads);
    Py_XDECREF(which);
    return made;
}

static void little_endian(char *to, uint64_t value, int bytes)
{
    for (; bytes--; value >>= 8)
        *to++ = (char)(value & 255);
}

/* ordinary.py's end; whether its point is written, or nothing is done
yet. -1: it is written, and what was called then raised an exception. */
static int quick_end(State *state, Run *run)
{
    Way way;
    Line line;
    int ended = 0;
    find_way(state, run->influx, &way);
    line_begin(&line);
    if (way.sender == NULL || !put_success(state, &way, run, &line))
        goto done;
    if (way.relay == Py_None) {
        if (buffer_append((Buffer *)way.sender->buffer, line.text, line.length))
            goto done;
        run->over = 1;
        PyObject *none = buffer_grown(way.sender);
        ended = none == NULL ? -1 : 1;
        Py_XDECREF(none);
    } else if (is_open(state->names, &way)) {
        char which[12];
        long long pid = pid_of(state->names, &way);
        if (pid < 0)
            goto done;
        little_endian(which, (uint64_t)pid, 4);
        little_endian(which + 4, (uint64_t)run->began, 8);
        ended = write_frame(
            way.sender->pipe, END_FRAME, way.sender->database, which, sizeof which, line.text,
            line.length);
        if (ended) {
            *(uint64_t *)way.sender->points.buf += 1;
            run->over = 1;
        }
    }
done:
    line_end(&line);
    leave_way(&way);
    return ended;
}

/* A run has ended: what `task_postrun` says. */
static PyObject *on_task_end(PyObject *given, PyObject *args, PyObject *said)
{
    PyObject *const *bound = &PyTuple_GET_ITEM(given, 0);
    State *state = PyModule_GetState(bound[MODULE]);
    PyObject *const *name = state->names;
    PyObject *task = item(said, name[TASK]), *id = item(said, name[TASK_ID]);
    PyObject *request = task == NULL ? NULL : top_of(name, task);
    PyObject *number = request == NULL ? NULL : PyLong_FromVoidPtr(request);
    PyObject *found = item(bound[RUNS], number), *none;
    int ended = 0;
    if (found != NULL && id != NULL && Py_TYPE(found) == state->run &&
        item(said, name[RUN_STATE]) == name[SUCCESS]) {
        Run *run = (Run *)Py_NewRef(found);
        if (run->clock && !run->is_eager && !run->over)
            ended = quick_end(state, run);
        Py_DECREF(run);
    }
    Raised raised;
    raised_take(&raised);
    if (ended) {
        PyDict_DelItem(bound[RUNS], number);
        none = PyObject_CallOneArg(bound[ENDED], id);
        PyErr_Clear();
    } else {
        none = PyObject_Call(bound[SLOW], args, said);
        if (none == NULL) {
            /* What comes last counts: the look at the task, its end, and what was left of that. */
            raised_drop(&raised);
            raised_take(&raised);
            none = PyObject_Call(bound[AGAIN], args, said);
            if (none == NULL && PyErr_ExceptionMatches(PyExc_Exception)) {
                PyErr_Clear();
            } else if (none == NULL) {
                raised_drop(&raised);
                raised_take(&raised);
            }
        } else if (raised.kind != NULL && PyErr_GivenExceptionMatches(raised.kind, PyExc_Exception)) {
            raised_drop(&raised);
            raised.kind = raised.value = raised.trace = NULL;
        }
    }
    Py_XDECREF(none);
    Py_XDECREF(number);
    Py_XDECREF(request);
    if (raised.kind != NULL)
        return raised_again(&raised);
    Py_RETURN_NONE;
}

static PyMethodDef task_init_def = {
    "on_task_init", (PyCFunction)(void (*)(void))on_task_init, METH_FASTCALL | METH_KEYWORDS,
    "As a loader's: a run starts."};

static PyMethodDef task_end_def = {
    "on_task_end", (PyCFunction)(void (*)(void))on_task_end, METH_VARARGS | METH_KEYWORDS,
    "on_task_end($self, /, **said)\n--\n\nAs a receiver of task_postrun: a run has ended."};

/* A function bound to the module and to what it is given. */
static PyObject *bind(PyObject *module, PyObject *args, PyMethodDef *def, Py_ssize_t size)
{
    if (PyTuple_GET_SIZE(args) != size - 1 || !PyDict_CheckExact(PyTuple_GET_ITEM(args, 0))) {
        PyErr_Format(PyExc_TypeError, "expected a dict, and %zd more", size - 2);
        return NULL;
    }
    PyObject *bound = PyTuple_New(size);
    if (bound == NULL)
        return NULL;
    PyTuple_SET_ITEM(bound, MODULE, Py_NewRef(module));
    for (Py_ssize_t each = 1; each < size; each++)
        PyTuple_SET_ITEM(bound, each, Py_NewRef(PyTuple_GET_ITEM(args, each - 1)));
    PyObject *function = PyCFunction_New(def, bound);
    Py_DECREF(bound);
    return function;
}

static PyObject *task_init(PyObject *module, PyObject *args)
{
    return bind(module, args, &task_init_def, INIT_BOUND);
}

static PyObject *task_end(PyObject *module, PyObject *args)
{
    return bind(module, args, &task_end_def, END_BOUND);
}

/* -- the module ---------------------------------------------------------------------------------- */

static PyObject *encoder(PyObject *module, PyObject *args)
{
    PyObject *constant, *constant_text, *clock, *on_left_out, *python_encode, *slow;
    PyObject *types = Py_None;
    long long unit;
    if (!PyArg_ParseTuple(
            args, "O!O!LOOOO|O:encoder", &PyDict_Type, &constant, &PyBytes_Type, &constant_text, &unit,
            &clock, &on_left_out, &python_encode, &slow, &types))
        return NULL;
    if (types != Py_None && !PyDict_CheckExact(types)) {
        PyErr_SetString(PyExc_TypeError, "expected types in a dict, or None");
        return NULL;
    }
    State *state = PyModule_GetState(module);
    Encoder *self = (Encoder *)state->encoder->tp_alloc(state->encoder, 0);
    if (self == NULL)
        return NULL;
    self->constant = Py_NewRef(constant);
    self->constant_text = Py_NewRef(constant_text);
    self->clock = Py_NewRef(clock);
    self->on_left_out = Py_NewRef(on_left_out);
    self->encode = Py_NewRef(python_encode);
    self->slow = Py_NewRef(slow);
    self->types = Py_NewRef(types);
    self->stamps = Py_TYPE(clock) == state->stamps ? (Stamps *)clock : NULL;
    self->unit = unit;
    PyObject *function = PyCFunction_New(&encode_def, (PyObject *)self);
    Py_DECREF(self);
    return function;
}

static Sender *make_sender(
    State *state, PyObject *encode, PyObject *points, PyObject *python_send, PyObject *wake)
{
    PyObject *encoder = PyCFunction_GET_SELF(encode);
    if (encoder == NULL || Py_TYPE(encoder) != state->encoder ||
        ((Encoder *)encoder)->stamps == NULL ||
        ((Encoder *)encoder)->stamps->clock != Py_None) {
        PyErr_SetString(PyExc_TypeError, "expected an encode of this module, with its own clock");
        return NULL;
    }
    Sender *self = (Sender *)state->sender->tp_alloc(state->sender, 0);
    if (self == NULL)
        return NULL;
    if (PyObject_GetBuffer(points, &self->points, PyBUF_WRITABLE)) {
        Py_DECREF(self);
        return NULL;
    }
    if (self->points.len < (Py_ssize_t)sizeof(uint64_t)) {
        PyErr_SetString(PyExc_ValueError, "expected a cell of 64 bits");
        Py_DECREF(self);
        return NULL;
    }
    self->encoder = Py_NewRef(encoder);
    self->send = Py_NewRef(python_send);
    self->wake = Py_NewRef(wake);
    return self;
}

static PyObject *send_of(Sender *self)
{
    PyObject *function = PyCFunction_New(&send_def, (PyObject *)self);
    Py_DECREF(self);
    return function;
}

static PyObject *sender(PyObject *module, PyObject *args)
{
    State *state = PyModule_GetState(module);
    PyObject *encode, *buffer, *points, *python_send, *wake;
    long long due_lines, due_bytes;
    if (!PyArg_ParseTuple(
            args, "O!O!OLLOO:sender", &PyCFunction_Type, &encode, state->buffer, &buffer, &points,
            &due_lines, &due_bytes, &python_send, &wake))
        return NULL;
    Sender *self = make_sender(state, encode, points, python_send, wake);
    if (self == NULL)
        return NULL;
    self->buffer = Py_NewRef(buffer);
    self->due_lines = due_lines;
    self->due_bytes = due_bytes;
    return send_of(self);
}

static PyObject *relay_sender(PyObject *module, PyObject *args)
{
    State *state = PyModule_GetState(module);
    PyObject *encode, *points, *python_send, *put, *handler_of;
    int pipe, database;
    if (!PyArg_ParseTuple(
            args, "O!iiOOOO:relay_sender", &PyCFunction_Type, &encode, &pipe, &database, &points,
            &python_send, &put, &handler_of))
        return NULL;
    Sender *self = make_sender(state, encode, points, python_send, put);
    if (self == NULL)
        return NULL;
    self->handler_of = Py_NewRef(handler_of);
    self->pipe = pipe;
    self->database = database;
    return send_of(self);
}

static PyMethodDef methods[] = {
    {"encoder", encoder, METH_VARARGS,
     "encoder(constant, constant_text, unit, clock, on_left_out, encode, slow, types): an encode."},
    {"sender", sender, METH_VARARGS,
     "sender(encode, buffer, points, due_lines, due_bytes, send, wake): a send."},
    {"relay_sender", relay_sender, METH_VARARGS,
     "relay_sender(encode, pipe, database, points, send, put, handler_of): one to the relay."},
    {"method", method, METH_VARARGS,
     "method(function, point, slot): a method that does what function would, of a point at once."},
    {"take_lines", take_lines, METH_VARARGS,
     "take_lines(data, position): position after the lines there, their database, the lines."},
    {"run_line", (PyCFunction)(void (*)(void))run_line, METH_FASTCALL,
     "run_line(head, facts, runtime, cpu, stamps, unit): the line of a run's point."},
    {"task_init", task_init, METH_VARARGS,
     "task_init(runs, slow, tasks, app, go_on, passing): an on_task_init."},
    {"task_end", task_end, METH_VARARGS, "task_end(runs, slow, again, ended): an on_task_end."},
    {NULL, NULL, 0, NULL},
};

static int add_type(PyObject *module, PyTypeObject **type, PyType_Spec *spec)
{
    *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *type == NULL ? -1 : PyModule_AddType(module, *type);
}

static int module_exec(PyObject *module)
{
    State *state = PyModule_GetState(module);
    fill_treatments(); /* always the same: harmless in a second interpreter */
    for (int each = 0; each < NAMES; each++)
        if ((state->names[each] = PyUnicode_InternFromString(names[each])) == NULL)
            return -1;
    return add_type(module, &state->encoder, &encoder_spec) ||
                   add_type(module, &state->stamps, &stamps_spec) ||
                   add_type(module, &state->lines, &lines_spec) ||
                   add_type(module, &state->buffer, &buffer_spec) ||
                   add_type(module, &state->sender, &sender_spec) ||
                   add_type(module, &state->method, &method_spec) ||
                   add_type(module, &state->run, &run_spec)
               ? -1
               : 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->encoder);
    Py_VISIT(state->stamps);
    Py_VISIT(state->lines);
    Py_VISIT(state->buffer);
    Py_VISIT(state->sender);
    Py_VISIT(state->method);
    Py_VISIT(state->run);
    for (int each = 0; each < NAMES; each++)
        Py_VISIT(state->names[each]);
    return 0;
}

static int module_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->encoder);
    Py_CLEAR(state->stamps);
    Py_CLEAR(state->lines);
    Py_CLEAR(state->buffer);
    Py_CLEAR(state->sender);
    Py_CLEAR(state->method);
    Py_CLEAR(state->run);
    for (int each = 0; each < NAMES; each++)
        Py_CLEAR(state->names[each]);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "celery_influx._speedups",
    .m_doc = "The way of an ordinary point, in C.",
    .m_size = sizeof(State),
    .m_methods = methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__speedups(void)
{
    return PyModuleDef_Init(&module_def);
}
