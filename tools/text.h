// What every part of the tool needs: messages, memory, growing text, numbers from text, JSON.
// A command line tool may stop where a library may not: a fault prints one line and exits, 1 for data, 2 for usage.
#ifndef TOOL_TEXT_H
#define TOOL_TEXT_H
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include "mil.h"

#if defined(__GNUC__) || defined(__clang__)
#define TOOL_FN static __attribute__((unused))
#define TOOL_NORETURN __attribute__((noreturn))
#else
#define TOOL_FN static
#define TOOL_NORETURN
#endif

// What a fault must not leave behind: files half written. The second is one that stays open while others are written.
static mil_writer *tool_open_writer, *tool_outer_writer;

// Bytes of the UTF-8 character at s, 0 when there is none: too long, a surrogate, cut.
TOOL_FN int utf8_length(const char *s)
{
    const unsigned char *p = (const unsigned char *)s;
    const int length = *p < 0x80 ? 1 : (*p & 0xe0) == 0xc0 && *p > 0xc1 ? 2 : (*p & 0xf0) == 0xe0 ? 3 : (*p & 0xf8) == 0xf0 && *p < 0xf5 ? 4 : 0;
    for (int k = 1; k < length; k++) if ((p[k] & 0xc0) != 0x80) return 0;
    if (length == 3 && ((*p == 0xe0 && p[1] < 0xa0) || (*p == 0xed && p[1] > 0x9f))) return 0;
    if (length == 4 && ((*p == 0xf0 && p[1] < 0x90) || (*p == 0xf4 && p[1] > 0x8f))) return 0;
    return length;
}

// For the terminal: control characters and what is no UTF-8 become '?'.
TOOL_FN void text_printable(char *s)
{
    for (int n; *s; s += n) {
        n = utf8_length(s);
        if (n == 0 || (unsigned char)*s < 0x20 || *s == 0x7f) { *s = '?'; n = 1; }
    }
}

// One line, whatever is in the names that it quotes: control characters become '?'.
TOOL_FN void tool_message(const char *head, const char *format, va_list list)
{
    va_list again;
    va_copy(again, list);
    const int need = vsnprintf(NULL, 0, format, list);
    char *line = need < 0 ? NULL : (char *)calloc((size_t)need + 1, 1);
    fflush(stdout);
    fputs(head, stderr);
    if (line) {
        vsnprintf(line, (size_t)need + 1, format, again);
        text_printable(line);
        fputs(line, stderr);
    } else {
        fputs(format, stderr);
    }
    va_end(again);
    fputc('\n', stderr);
    free(line);
}

TOOL_FN TOOL_NORETURN MIL_PRINTF(1, 2) void tool_fail(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    tool_message("mil: ", format, list);
    va_end(list);
    mil_writer_free(tool_open_writer);
    mil_writer_free(tool_outer_writer);
    exit(1);
}

TOOL_FN TOOL_NORETURN MIL_PRINTF(1, 2) void tool_usage(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    tool_message("mil: ", format, list);
    va_end(list);
    exit(2);
}

TOOL_FN MIL_PRINTF(1, 2) void tool_warn(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    tool_message("mil: warning: ", format, list);
    va_end(list);
}

// Ctrl-C and kill: loops ask between two bags whether to stop, so that no file is left half written.
static volatile sig_atomic_t tool_signal;

TOOL_FN void tool_catch(int number) { tool_signal = number; }

TOOL_FN void tool_catch_signals(void)
{
    static const int numbers[] = { SIGINT, SIGTERM, SIGHUP };
    for (int k = 0; k < 3; k++) {
        struct sigaction a;
        memset(&a, 0, sizeof a);
        a.sa_handler = tool_catch;
        a.sa_flags = SA_RESTART | (int)SA_RESETHAND;       // a second one stops at once
        struct sigaction before;
        if (sigaction(numbers[k], NULL, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(numbers[k], &a, NULL);
    }
}

TOOL_FN void tool_stop_if_asked(void)
{
    if (!tool_signal) return;
    const int number = tool_signal;
    mil_writer_free(tool_open_writer);
    mil_writer_free(tool_outer_writer);
    fflush(stdout);
    fprintf(stderr, "mil: stopped by signal %d\n", number);
    signal(number, SIG_DFL);                               // the shell sees what it was
    raise(number);
    exit(128 + number);
}

// Stops with the library's own sentence unless all went well.
TOOL_FN void tool_check(mil_context *ctx, mil_status status)
{
    if (status != MIL_OK) tool_fail("%s", mil_error(ctx)[0] ? mil_error(ctx) : mil_status_text(status));
}

// ---- memory: zeroed, never NULL ----
TOOL_FN void *tool_alloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) tool_fail("out of memory: %zu elements of %zu bytes", count, size);
    return p;
}

#define TOOL_NEW(type, count) ((type *)tool_alloc((size_t)(count), sizeof(type)))

TOOL_FN void *tool_grow(void *p, size_t count, size_t size)
{
    const size_t bytes = count * size;
    void *q = size && count > SIZE_MAX / size ? NULL : realloc(p, bytes ? bytes : 1);
    if (!q) tool_fail("out of memory: %zu elements of %zu bytes", count, size);
    return q;
}

TOOL_FN char *tool_copy(const char *text, size_t length)
{
    char *p = TOOL_NEW(char, length + 1);
    memcpy(p, text, length);
    return p;
}

TOOL_FN char *tool_string(const char *text) { return tool_copy(text, strlen(text)); }

// ---- text that grows ----
typedef struct text { char *data; size_t size, room; } text;     // data is NULL while empty, else ends with a 0

TOOL_FN void text_put(text *t, const char *data, size_t size)
{
    if (t->size + size + 1 > t->room) {
        t->room = (t->size + size + 1) * 3 / 2 + 64;
        t->data = (char *)tool_grow(t->data, t->room, 1);
    }
    memcpy(t->data + t->size, data, size);
    t->size += size;
    t->data[t->size] = 0;
}

TOOL_FN MIL_PRINTF(2, 3) void text_add(text *t, const char *format, ...)
{
    char small[256];
    va_list list;
    va_start(list, format);
    const int need = vsnprintf(small, sizeof small, format, list);
    va_end(list);
    if (need < 0) tool_fail("a text could not be formatted");
    if ((size_t)need < sizeof small) {
        text_put(t, small, (size_t)need);
        return;
    }
    char *large = TOOL_NEW(char, need + 1);
    va_start(list, format);
    vsnprintf(large, (size_t)need + 1, format, list);
    va_end(list);
    text_put(t, large, (size_t)need);
    free(large);
}

TOOL_FN void text_free(text *t)
{
    free(t->data);
    memset(t, 0, sizeof *t);
}

TOOL_FN MIL_PRINTF(1, 2) char *tool_format(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    const int need = vsnprintf(NULL, 0, format, list);
    va_end(list);
    char *p = TOOL_NEW(char, need < 0 ? 1 : need + 1);
    va_start(list, format);
    vsnprintf(p, (size_t)(need < 0 ? 1 : need + 1), format, list);
    va_end(list);
    return p;
}

TOOL_FN int text_is_utf8(const char *s)
{
    for (int n; *s; s += n) if ((n = utf8_length(s)) == 0) return 0;
    return 1;
}

// A string literal of JSON, quotes included. Bytes that are not UTF-8 become '?': the output is always valid.
TOOL_FN void text_json(text *t, const char *s)
{
    text_put(t, "\"", 1);
    for (const unsigned char *p = (const unsigned char *)s; *p;) {
        const int length = utf8_length((const char *)p);
        if (!length) { text_put(t, "?", 1); p++; continue; }
        if (*p == '"' || *p == '\\') text_add(t, "\\%c", *p);
        else if (*p < 0x20) text_add(t, "\\u%04x", *p);
        else text_put(t, (const char *)p, (size_t)length);
        p += length;
    }
    text_put(t, "\"", 1);
}

// A number of JSON; null where it is none.
TOOL_FN void text_number(text *t, double x, int digits)
{
    if (isfinite(x)) text_add(t, "%.*g", digits, x);
    else text_put(t, "null", 4);
}

// A field of CSV, quoted where it has to be.
TOOL_FN void text_field(text *t, const char *s)
{
    if (!strpbrk(s, ",;\t\"\r\n") && s[0] != ' ' && (!s[0] || s[strlen(s) - 1] != ' ')) {
        text_put(t, s, strlen(s));
        return;
    }
    text_put(t, "\"", 1);
    for (; *s; s++) text_put(t, *s == '"' ? "\"\"" : s, *s == '"' ? 2 : 1);
    text_put(t, "\"", 1);
}

// ---- numbers ----
TOOL_FN int parse_int(const char *s, int64_t *out)
{
    char *end;
    errno = 0;
    const long long x = strtoll(s, &end, 10);
    if (end == s || *end || errno || isspace((unsigned char)*s)) return 0;
    *out = x;
    return 1;
}

TOOL_FN int parse_real(const char *s, double *out)
{
    char *end;
    const double x = strtod(s, &end);
    if (end == s || *end || !isfinite(x) || isspace((unsigned char)*s)) return 0;
    *out = x;
    return 1;
}

// ---- names that were meant ----
// Letters to change, add, drop or swap with the next, to get from a to b.
TOOL_FN int name_distance(const char *a, const char *b)
{
    enum { LIMIT = 48 };
    const int n = (int)strlen(a), m = (int)strlen(b);
    int d[3][LIMIT + 1];
    if (n > LIMIT || m > LIMIT) return LIMIT;
    for (int j = 0; j <= m; j++) d[0][j] = j;
    for (int i = 1; i <= n; i++) {
        int *now = d[i % 3], *last = d[(i + 2) % 3], *before = d[(i + 1) % 3];
        now[0] = i;
        for (int j = 1; j <= m; j++) {
            const int change = last[j - 1] + (tolower((unsigned char)a[i - 1]) != tolower((unsigned char)b[j - 1]));
            int best = last[j] + 1 < now[j - 1] + 1 ? last[j] + 1 : now[j - 1] + 1;
            if (change < best) best = change;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && before[j - 2] + 1 < best) best = before[j - 2] + 1;
            now[j] = best;
        }
    }
    return d[n % 3][m];
}

// Keeps in *best the nearer of *best and candidate; *distance starts at a large number.
TOOL_FN void name_nearer(const char *wanted, const char *candidate, const char **best, int *distance)
{
    const int d = name_distance(wanted, candidate);
    if (d < *distance) { *distance = d; *best = candidate; }
}

// ---- a seeded generator: a function of (seed, stream, index), the same on every machine ----
TOOL_FN uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint64_t x = seed * 0x9e3779b97f4a7c15u + stream * 0xbf58476d1ce4e5b9u + index * 0x94d049bb133111ebu + 0x2545f4914f6cdd1du;
    for (int round = 0; round < 2; round++) {              // twice the finaliser of splitmix64
        x ^= x >> 30; x *= 0xbf58476d1ce4e5b9u;
        x ^= x >> 27; x *= 0x94d049bb133111ebu;
        x ^= x >> 31;
    }
    return x;
}

TOOL_FN double random_uniform(uint64_t seed, uint64_t stream, uint64_t index)       // [0, 1)
{
    return (double)(random_bits(seed, stream, index) >> 11) / 9007199254740992.0;
}

TOOL_FN double random_normal(uint64_t seed, uint64_t stream, uint64_t index)
{
    const double u = 1 - random_uniform(seed, stream, 2 * index), v = random_uniform(seed, stream, 2 * index + 1);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

TOOL_FN void random_shuffle(uint64_t seed, uint64_t stream, int64_t *x, int64_t n)
{
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)(random_bits(seed, stream, (uint64_t)i) % (uint64_t)(i + 1)), t = x[i];
        x[i] = x[j];
        x[j] = t;
    }
}

TOOL_FN uint64_t hash_bytes(uint64_t hash, const void *data, size_t size)           // FNV-1a; starts from 14695981039346656037
{
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < size; i++) hash = (hash ^ p[i]) * 1099511628211u;
    return hash;
}

// ---- JSON ----
// A tree of values. Children are in order; a child of an object has a key. Numbers keep their text.
typedef struct json { char type; char *key, *value; struct json *child, *next; } json;      // type: { [ s n t f 0 (null)
typedef struct json_reader { const char *p, *end; const char *fault; } json_reader;

TOOL_FN void json_free(json *j)
{
    while (j) {
        json *next = j->next;
        json_free(j->child);
        free(j->key);
        free(j->value);
        free(j);
        j = next;
    }
}

TOOL_FN void json_blanks(json_reader *r)
{
    while (r->p < r->end && (*r->p == ' ' || *r->p == '\t' || *r->p == '\n' || *r->p == '\r')) r->p++;
}

TOOL_FN char *json_read_string(json_reader *r)
{
    text t = { NULL, 0, 0 };
    text_put(&t, "", 0);
    for (r->p++; r->p < r->end && *r->p != '"'; r->p++) {
        if (*r->p != '\\') { text_put(&t, r->p, 1); continue; }
        if (++r->p == r->end) break;
        const char *from = "bfnrt", *to = "\b\f\n\r\t", *k = *r->p ? strchr(from, *r->p) : NULL;
        if (*r->p == 'u') {
            unsigned u = 0;
            if (r->end - r->p < 5 || sscanf(r->p + 1, "%4x", &u) != 1) { r->fault = "a \\u escape without four digits"; break; }
            char utf[4];
            const size_t n = u < 0x80 ? 1 : u < 0x800 ? 2 : 3;
            if (n == 1) utf[0] = (char)u;
            if (n == 2) utf[0] = (char)(0xc0 | u >> 6), utf[1] = (char)(0x80 | (u & 63));
            if (n == 3) utf[0] = (char)(0xe0 | u >> 12), utf[1] = (char)(0x80 | (u >> 6 & 63)), utf[2] = (char)(0x80 | (u & 63));
            text_put(&t, utf, n);
            r->p += 4;
        } else if (k) text_put(&t, to + (k - from), 1);
        else text_put(&t, r->p, 1);
    }
    if (r->p >= r->end) r->fault = "a string without its closing quote";
    else r->p++;
    return t.data;
}

TOOL_FN json *json_read(json_reader *r, int depth)
{
    json *j = TOOL_NEW(json, 1);
    json_blanks(r);
    if (depth > 32) r->fault = "more than 32 levels";
    if (r->p >= r->end) r->fault = "it ends too early";
    if (r->fault) return j;
    if (*r->p == '{' || *r->p == '[') {
        const char close = *r->p == '{' ? '}' : ']';
        json **tail = &j->child;
        j->type = *r->p++;
        json_blanks(r);
        if (r->p < r->end && *r->p == close) { r->p++; return j; }
        while (!r->fault) {
            char *key = NULL;
            json_blanks(r);
            if (j->type == '{') {
                if (r->p >= r->end || *r->p != '"') { r->fault = "a key without quotes"; break; }
                key = json_read_string(r);
                json_blanks(r);
                if (r->p >= r->end || *r->p++ != ':') r->fault = "a key without ':'";
            }
            *tail = json_read(r, depth + 1);
            (*tail)->key = key;
            tail = &(*tail)->next;
            json_blanks(r);
            if (r->p >= r->end) r->fault = "it ends too early";
            else if (*r->p == close) { r->p++; break; }
            else if (*r->p++ != ',') r->fault = "a ',' is missing";
        }
    } else if (*r->p == '"') {
        j->type = 's';
        j->value = json_read_string(r);
    } else {
        const char *start = r->p;
        while (r->p < r->end && (isalnum((unsigned char)*r->p) || strchr("+-.", *r->p))) r->p++;
        j->value = tool_copy(start, (size_t)(r->p - start));
        double x;
        if (strcmp(j->value, "true") == 0) j->type = 't';
        else if (strcmp(j->value, "false") == 0) j->type = 'f';
        else if (strcmp(j->value, "null") == 0) j->type = '0';
        else if (parse_real(j->value, &x)) j->type = 'n';
        else r->fault = "a value that is none";
    }
    return j;
}

// NULL and a reason when it is not JSON.
TOOL_FN json *json_parse(const char *data, size_t size, const char **fault)
{
    json_reader r = { data, data + size, NULL };
    json *j = json_read(&r, 0);
    json_blanks(&r);
    if (!r.fault && r.p != r.end) r.fault = "something follows the value";
    *fault = r.fault;
    if (!r.fault) return j;
    json_free(j);
    return NULL;
}

TOOL_FN const json *json_get(const json *object, const char *key)
{
    for (const json *j = object && object->type == '{' ? object->child : NULL; j; j = j->next) if (strcmp(j->key, key) == 0) return j;
    return NULL;
}

TOOL_FN const char *json_text(const json *object, const char *key, const char *fallback)
{
    const json *j = json_get(object, key);
    return j && j->value ? j->value : fallback;
}

TOOL_FN double json_number(const json *object, const char *key, double fallback)
{
    const json *j = json_get(object, key);
    double x;
    return j && j->type == 'n' && parse_real(j->value, &x) ? x : fallback;
}

// A value as an option of mil_create takes it: text bare, lists as [a,b].
TOOL_FN void json_option(const json *j, text *out)
{
    if (j->type == '[' || j->type == '{') {
        text_add(out, "%c", j->type);
        for (const json *c = j->child; c; c = c->next) {
            if (c->key) text_add(out, "%s:", c->key);
            json_option(c, out);
            if (c->next) text_put(out, ",", 1);
        }
        text_add(out, "%c", j->type == '[' ? ']' : '}');
    } else {
        text_add(out, "%s", j->value);
    }
}

// ---- files ----
TOOL_FN const char *path_name(const char *path)            // what follows the last slash
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

TOOL_FN int has_ending(const char *s, const char *ending)
{
    const size_t n = strlen(s), m = strlen(ending);
    return n > m && strcasecmp(s + n - m, ending) == 0;
}

// A name without the ending that says how its features or its slide are stored; other dots stay (`TCGA-1.2` is a name).
TOOL_FN char *path_stem(const char *path)
{
    static const char *const endings[] = { ".safetensors", ".npy", ".h5", ".hdf5", ".pt", ".pth", ".svs", ".tif", ".tiff", ".ndpi",
        ".mrxs", ".scn", ".czi", ".bif", ".svslide", ".vms", ".vmu", ".dcm", ".isyntax", ".png", ".jpg", ".csv", NULL };
    const char *name = path_name(path);
    for (int k = 0; endings[k]; k++) if (has_ending(name, endings[k])) return tool_copy(name, strlen(name) - strlen(endings[k]));
    return tool_string(name);
}

TOOL_FN char *path_join(const char *folder, const char *name)
{
    const size_t n = strlen(folder);
    return tool_format("%s%s%s", folder, n && folder[n - 1] == '/' ? "" : "/", name);
}

TOOL_FN void file_write(mil_context *ctx, const char *path, const text *t)
{
    tool_check(ctx, mil_file_write(ctx, path, t->data ? t->data : "", t->size));
}

// A JSON file, or a stop that names it.
TOOL_FN json *json_open(mil_context *ctx, const char *path)
{
    mil_file *file;
    const char *fault;
    tool_check(ctx, mil_file_open(ctx, path, 64u << 20, MIL_FILE_READ, &file));
    json *j = json_parse(mil_file_size(file) ? (const char *)mil_file_data(file) : "", mil_file_size(file), &fault);
    mil_file_free(file);
    if (!j) tool_fail("%s: not JSON: %s", path, fault);
    return j;
}
#endif
