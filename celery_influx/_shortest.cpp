// A double as repr() writes it, by C++17's std::to_chars where the compiler's library has that for
// doubles, and by CPython's own, slower way where not.

#include <Python.h>

#include <cmath>
#include <cstring>

#if defined(__has_include)
#if __has_include(<charconv>)
#include <charconv>
#endif
#endif

extern "C" int celery_influx_repr(double value, char *text);

// Writes at most 24 bytes for a finite value; how many. -1 with MemoryError set.
int celery_influx_repr(double value, char *text)
{
#if defined(__cpp_lib_to_chars)
    double size = std::fabs(value);
    if (size != 0 && (size < 1e-4 || size >= 1e16))
        return std::to_chars(text, text + 24, value, std::chars_format::scientific).ptr - text;
    char *end = std::to_chars(text, text + 24, value, std::chars_format::fixed).ptr;
    if (std::memchr(text, '.', end - text) == NULL) {
        *end++ = '.';
        *end++ = '0';
    }
    return end - text;
#else
    char *owned = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, NULL);
    if (owned == NULL)
        return -1;
    int length = std::strlen(owned);
    std::memcpy(text, owned, length);
    PyMem_Free(owned);
    return length;
#endif
}
