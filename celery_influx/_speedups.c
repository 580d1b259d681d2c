/* The encoder of line_protocol.py in C: ordinary points, written as its `encode` writes them.

Whatever is out of the ordinary, and every error, is left to the Python it stands in for: so there
is one rule, and this file holds none that Python does not. What must hold here, too:

- While a point is read no Python code runs: only exact types are looked at, whose hashing and
  comparing is C's. The clock, `on_left_out` and the Python encoder, which are Python's, are called
  when nothing of the point is being walked through; the line begun is on this call's own stack, so
  that they may send points themselves, raise, or be interrupted by a signal's handler.
- Nothing is kept between calls, and nothing shared: any number of threads and sub-interpreters may
  encode at once. Without the interpreter's lock (3.13t) dicts are walked through in a critical
  section.
- Every reference to what a point holds is borrowed from the point, which the caller holds, inside
  of one walk. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef Py_BEGIN_CRITICAL_SECTION
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

/* As in line_reader.py. */
#define MAX_LENGTH 65535
#define MIN_TIME (-9223372036854775806LL)
#define MAX_TIME 9223372036854775806LL

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

/* Make room for so many bytes more. A line that is too long is rare long before it is large. */
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
enum { MEASUREMENT, NAME, VALUE };

static unsigned char treatment[3][128];

static void fill_treatments(void)
{
    for (int of = MEASUREMENT; of <= NAME; of++) {
        memset(treatment[of], TOO_RARE, 0x20);
        treatment[of]['\\'] = TOO_RARE;
        treatment[of][','] = treatment[of][' '] = ESCAPED;
    }
    treatment[NAME]['='] = ESCAPED;
    treatment[VALUE]['"'] = treatment[VALUE]['\\'] = ESCAPED;
}

/* A str in UTF-8. Empty names are the caller's business. */
static int put_text(Line *line, PyObject *text, int what)
{
    const unsigned char *treat = treatment[what];
    Py_ssize_t length = PyUnicode_GET_LENGTH(text);
    if (length > MAX_LENGTH)
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

/* A measurement, a key or a tag's value. InfluxDB's own names begin with an underscore, a comment
with #, and "#!~" parts series from fields in its files: Python knows which of these go. */
static int put_name(Line *line, PyObject *name, int what)
{
    Py_ssize_t begin = line->length;
    if (!PyUnicode_CheckExact(name) || PyUnicode_GET_LENGTH(name) == 0)
        return RARE;
    int came = put_text(line, name, what);
    if (came == DONE && memchr(line->text + begin, '#', (size_t)(line->length - begin)) != NULL)
        return RARE;
    return came;
}

static int put_key(Line *line, PyObject *key)
{
    Py_ssize_t begin = line->length;
    int came = put_name(line, key, NAME);
    if (came == DONE && line->length - begin == 4 && memcmp(line->text + begin, "time", 4) == 0)
        return RARE; /* InfluxDB's own column */
    return came;
}

/* -- numbers ------------------------------------------------------------------------------------- */

#define LONGEST_NUMBER 32

static void put_integer(Line *line, long long value)
{
    char digits[LONGEST_NUMBER], *first = digits + sizeof digits;
    unsigned long long rest = value < 0 ? -(unsigned long long)value : (unsigned long long)value;
    do
        *--first = (char)('0' + rest % 10);
    while (rest /= 10);
    if (value < 0)
        *--first = '-';
    put_bytes(line, first, digits + sizeof digits - first);
}

/* _shortest.cpp */
int celery_influx_digits(double value, char *digits, int *exponent);

/* As repr() does: with an exponent below 1e-4 and from 1e16 on. */
static int put_float(Line *line, double value)
{
    char digits[LONGEST_NUMBER];
    int exponent, count;
    if (signbit(value)) {
        put(line, '-');
        value = -value;
    }
    if (value == 0.0) {
        put_bytes(line, "0.0", 3);
        return DONE;
    }
    count = celery_influx_digits(value, digits, &exponent);
    if (count < 0)
        return BROKEN;
    if (exponent < -4 || exponent >= 16) {
        put(line, digits[0]);
        if (count > 1) {
            put(line, '.');
            put_bytes(line, digits + 1, count - 1);
        }
        put_bytes(line, exponent < 0 ? "e-" : "e+", 2);
        int power = exponent < 0 ? -exponent : exponent;
        if (power < 10)
            put(line, '0');
        put_integer(line, power);
    } else if (exponent < 0) {
        put_bytes(line, "0.000", 1 - exponent);
        put_bytes(line, digits, count);
    } else {
        for (int i = 0; i <= exponent || i <= count - 1; i++) {
            if (i == exponent + 1)
                put(line, '.');
            put(line, i < count ? digits[i] : '0');
        }
        if (count <= exponent + 1)
            put_bytes(line, ".0", 2);
    }
    return DONE;
}

/* -- a point ------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *constant;      /* dict of the constant tags */
    PyObject *constant_text; /* bytes: the same, escaped */
    PyObject *clock;         /* callable or None */
    PyObject *on_left_out;   /* callable or None */
    PyObject *encode;        /* the Python encoder */
    PyObject *slow;          /* its slow way, for a point whose clock has been asked */
    long long unit;
} Encoder;

static int put_tag_value(Line *line, PyObject *value)
{
    if (PyUnicode_CheckExact(value))
        return put_name(line, value, NAME);
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
    Py_ssize_t place = 0;
    PyObject *key, *value;
    while (PyDict_Next(tags, &place, &key, &value)) {
        if (!PyUnicode_CheckExact(key))
            return RARE;
        if (PyDict_GET_SIZE(self->constant)) {
            int there = PyDict_Contains(self->constant, key);
            if (there)
                return there < 0 ? BROKEN : RARE; /* it stands in the other's place */
        }
        if (value == Py_None || (PyUnicode_CheckExact(value) && !PyUnicode_GET_LENGTH(value)))
            continue;
        if (line_room(line, 2))
            return BROKEN;
        put(line, ',');
        int came = put_key(line, key);
        if (came)
            return came;
        if (line_room(line, 1))
            return BROKEN;
        put(line, '=');
        came = put_tag_value(line, value);
        if (came)
            return came;
    }
    return DONE;
}

static int put_fields(Line *line, PyObject *fields, Py_ssize_t *left_out)
{
    Py_ssize_t place = 0;
    PyObject *key, *value;
    char separator = ' ';
    while (PyDict_Next(fields, &place, &key, &value)) {
        Py_ssize_t before = line->length;
        if (!PyUnicode_CheckExact(key) || PyUnicode_GET_LENGTH(key) == 0)
            return RARE;
        if (PyUnicode_READ_CHAR(key, 0) == '_')
            return RARE;
        if (line_room(line, 1))
            return BROKEN;
        put(line, separator);
        int came = put_key(line, key);
        if (came)
            return came;
        if (line_room(line, LONGEST_NUMBER + 2))
            return BROKEN;
        put(line, '=');
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
            put_integer(line, number);
            put(line, 'i');
        } else if (PyUnicode_CheckExact(value)) {
            put(line, '"');
            came = put_text(line, value, VALUE);
            if (came == DONE) {
                if (line_room(line, 1))
                    return BROKEN;
                put(line, '"');
            }
        } else if (value == Py_None) {
            line->length = before;
            continue;
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
    if (PyUnicode_GET_LENGTH(measurement) && PyUnicode_READ_CHAR(measurement, 0) == '_')
        return RARE;
    came = put_name(line, measurement, MEASUREMENT);
    if (came)
        return came;
    Py_ssize_t size = PyBytes_GET_SIZE(self->constant_text);
    if (line_room(line, size))
        return BROKEN;
    put_bytes(line, PyBytes_AS_STRING(self->constant_text), size);
    if (tags != Py_None) {
        Py_BEGIN_CRITICAL_SECTION(tags);
        came = put_tags(self, line, tags);
        Py_END_CRITICAL_SECTION();
        if (came)
            return came;
    }
    Py_BEGIN_CRITICAL_SECTION(fields);
    came = put_fields(line, fields, left_out);
    Py_END_CRITICAL_SECTION();
    return came;
}

/* The time, rounded down to the encoder's unit. */
static int put_time(Encoder *self, Line *line, PyObject *timestamp)
{
    int overflow;
    if (!PyLong_CheckExact(timestamp))
        return RARE;
    long long time = PyLong_AsLongLongAndOverflow(timestamp, &overflow);
    if (overflow)
        return RARE;
    long long rest = time % self->unit;
    long long ticks = time / self->unit - (rest < 0);
    /* Rounded down it must not be before the first time there is. */
    if (time > MAX_TIME || ticks < MIN_TIME / self->unit)
        return RARE;
    if (line_room(line, LONGEST_NUMBER))
        return BROKEN;
    put(line, ' ');
    put_integer(line, ticks);
    return DONE;
}

static PyObject *encode(PyObject *arg, PyObject *point)
{
    Encoder *self = (Encoder *)arg;
    Line line;
    Py_ssize_t left_out = 0;
    PyObject *result = NULL;
    PyObject *way = self->encode; /* that this point goes if it is rare */

    if (!PyTuple_Check(point) || Py_TYPE(point)->tp_iter != PyTuple_Type.tp_iter ||
        PyTuple_GET_SIZE(point) != 4)
        return PyObject_CallOneArg(way, point);
    PyObject *timestamp = PyTuple_GET_ITEM(point, 3);

    line_begin(&line);
    int came = put_point(
        self, &line, PyTuple_GET_ITEM(point, 0), PyTuple_GET_ITEM(point, 1),
        PyTuple_GET_ITEM(point, 2), &left_out);
    if (came == DONE && timestamp != Py_None) {
        came = put_time(self, &line, timestamp);
    } else if (came == DONE && self->clock != Py_None) {
        way = self->slow;
        PyObject *now = PyObject_CallNoArgs(self->clock);
        if (now != NULL) {
            came = now == Py_None ? DONE : put_time(self, &line, now);
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
    if (came == DONE && line.length > MAX_LENGTH)
        came = RARE;
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

/* -- the module ---------------------------------------------------------------------------------- */

static int encoder_traverse(Encoder *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->constant);
    Py_VISIT(self->clock);
    Py_VISIT(self->on_left_out);
    Py_VISIT(self->encode);
    Py_VISIT(self->slow);
    return 0;
}

static int encoder_clear(Encoder *self)
{
    Py_CLEAR(self->constant);
    Py_CLEAR(self->constant_text);
    Py_CLEAR(self->clock);
    Py_CLEAR(self->on_left_out);
    Py_CLEAR(self->encode);
    Py_CLEAR(self->slow);
    return 0;
}

static void encoder_dealloc(Encoder *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    encoder_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyType_Slot encoder_slots[] = {
    {Py_tp_traverse, encoder_traverse},
    {Py_tp_clear, encoder_clear},
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

static PyObject *encoder(PyObject *module, PyObject *args)
{
    PyObject *constant, *constant_text, *clock, *on_left_out, *python_encode, *slow;
    long long unit;
    if (!PyArg_ParseTuple(
            args, "O!O!LOOOO:encoder", &PyDict_Type, &constant, &PyBytes_Type, &constant_text, &unit,
            &clock, &on_left_out, &python_encode, &slow))
        return NULL;
    PyTypeObject *type = *(PyTypeObject **)PyModule_GetState(module);
    Encoder *self = (Encoder *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->constant = Py_NewRef(constant);
    self->constant_text = Py_NewRef(constant_text);
    self->clock = Py_NewRef(clock);
    self->on_left_out = Py_NewRef(on_left_out);
    self->encode = Py_NewRef(python_encode);
    self->slow = Py_NewRef(slow);
    self->unit = unit;
    PyObject *function = PyCFunction_New(&encode_def, (PyObject *)self);
    Py_DECREF(self);
    return function;
}

static PyMethodDef methods[] = {
    {"encoder", encoder, METH_VARARGS,
     "encoder(constant, constant_text, unit, clock, on_left_out, encode, slow): an encode."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    PyTypeObject **type = PyModule_GetState(module);
    fill_treatments(); /* always the same: harmless in a second interpreter */
    *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &encoder_spec, NULL);
    return *type == NULL ? -1 : 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(*(PyTypeObject **)PyModule_GetState(module));
    return 0;
}

static int module_clear(PyObject *module)
{
    Py_CLEAR(*(PyTypeObject **)PyModule_GetState(module));
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "celery_influx._speedups",
    .m_doc = "The encoder of line_protocol in C.",
    .m_size = sizeof(PyTypeObject *),
    .m_methods = methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__speedups(void)
{
    return PyModuleDef_Init(&module_def);
}
