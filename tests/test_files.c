// build: float private
// The files room: JSON, safetensors, NPY, atomic writing; the formats' rules one by one, and every failure in turn.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

// ---- failing system calls: call number fault_at of kind fault_kind fails with fault_errno ----
enum { CALL_ANY, CALL_OPEN, CALL_STAT, CALL_READ, CALL_WRITE, CALL_SYNC, CALL_CLOSE, CALL_RENAME, CALL_REMOVE, CALL_MAP };
static int fault_kind, fault_errno, fault_short, fault_forever;
static long fault_at = -1, fault_calls;

static int fault(int kind)
{
    if (fault_at < 0 || (fault_kind != CALL_ANY && fault_kind != kind)) return 0;
    if (kind == CALL_REMOVE) return 0;                     // cleaning up after a failure works
    if (fault_calls++ != fault_at && !fault_forever) return 0;
    errno = fault_errno;
    return 1;
}

static int     test_open(const char *path, int flags, mode_t mode) { return fault(CALL_OPEN) ? -1 : open(path, flags, mode); }
static int     test_stat(const char *path, struct stat *info) { return stat(path, info); }
static int     test_fstat(int fd, struct stat *info) { return fault(CALL_STAT) ? -1 : fstat(fd, info); }
static ssize_t test_read(int fd, void *dst, size_t size)
{
    if (fault(CALL_READ)) return fault_errno ? -1 : 0;     // without a reason: the file ends too early
    return read(fd, dst, fault_short && size > 3 ? 3 : size);
}
static ssize_t test_write(int fd, const void *src, size_t size)
{
    if (fault(CALL_WRITE)) return fault_errno ? -1 : 0;
    return write(fd, src, fault_short && size > 3 ? 3 : size);
}
#if defined(__STRICT_ANSI__) && !defined(__cplusplus)
int fsync(int fd);
#endif
static int test_sync(int fd) { return fault(CALL_SYNC) ? -1 : fsync(fd); }
static int test_close(int fd)
{
    const int failed = fault(CALL_CLOSE), code = errno;
    const int result = close(fd);
    if (failed) errno = code;
    return failed ? -1 : result;
}
static int   test_rename(const char *from, const char *to) { return fault(CALL_RENAME) ? -1 : rename(from, to); }
static void *test_map(int fd, size_t size)
{
    return fault(CALL_MAP) ? MAP_FAILED : mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
}

#define MILI_OS_OPEN(path, flags, mode) test_open(path, flags, mode)
#define MILI_OS_STAT(path, info) test_stat(path, info)
#define MILI_OS_FSTAT(fd, info) test_fstat(fd, info)
#define MILI_OS_READ(fd, dst, size) test_read(fd, dst, size)
#define MILI_OS_WRITE(fd, src, size) test_write(fd, src, size)
#define MILI_OS_SYNC(fd) test_sync(fd)
#define MILI_OS_CLOSE(fd) test_close(fd)
#define MILI_OS_RENAME(from, to) test_rename(from, to)
#define MILI_OS_MAP(fd, size) test_map(fd, size)

#define MIL_KEEP_PRIVATE_MACROS
#define MIL_IMPLEMENTATION
#include "mil.h"
#include "check.h"

// ---- an allocator that counts, and fails at one allocation or from there on ----
static long alloc_calls, alloc_fail_at = -1, alloc_live;
static int alloc_fail_after;

static void *test_reallocate(void *user, void *block, size_t old_size, size_t new_size)
{
    (void)user;
    (void)old_size;
    if (new_size == 0) {
        if (block) alloc_live--;
        free(block);
        return NULL;
    }
    const long call = alloc_calls++;
    if (alloc_fail_at >= 0 && (call == alloc_fail_at || (alloc_fail_after && call > alloc_fail_at))) return NULL;
    if (!block) alloc_live++;
    return realloc(block, new_size);
}

static mil_context *make_context(void)
{
    mil_context *ctx = NULL;
    mil_context_options options = mil_context_options_default();
    options.allocator.reallocate = test_reallocate;
    options.threads = 1;
    alloc_fail_at = -1;
    CHECK(mil_context_create(&ctx, &options) == MIL_OK);
    return ctx;
}

static void end_context(mil_context *ctx)
{
    mil_context_free(ctx);
    CHECK(alloc_live == 0);
}

// ---- helpers ----
static char folder[256];

static const char *in_folder(const char *name)
{
    static char path[4][512];
    static int turn;
    char *at = path[turn = (turn + 1) % 4];
    if (!folder[0]) {
        const char *base = getenv("TMPDIR");
        snprintf(folder, sizeof folder, "%.150s/mil_test_files_%ld", base ? base : "/tmp", (long)getpid());
        mkdir(folder, 0777);
    }
    snprintf(at, sizeof path[0], "%s/%s", folder, name);
    return at;
}

// Removes what is in the folder; returns how many files that were.
static int empty_folder(void)
{
    int n = 0;
    struct dirent *e;
    DIR *d = opendir((in_folder(""), folder));
    if (!d) return -1;
    while ((e = readdir(d)) != NULL) {
        if (e->d_name[0] == '.' && (!e->d_name[1] || e->d_name[1] == '.')) continue;
        n++;
        unlink(in_folder(e->d_name));
    }
    closedir(d);
    return n;
}

static void put_file(const char *path, const void *data, size_t size)
{
    FILE *f = fopen(path, "wb");
    if (!CHECK(f != NULL)) return;
    CHECK(fwrite(data, 1, size, f) == size);
    CHECK(fclose(f) == 0);
}

static unsigned char *get_file(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    unsigned char *bytes = NULL;
    *size = 0;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *size = (size_t)ftell(f);
    fseek(f, 0, SEEK_SET);
    bytes = (unsigned char *)malloc(*size + 1);
    if (fread(bytes, 1, *size, f) != *size) *size = 0;
    fclose(f);
    return bytes;
}

static int file_is(const char *path, const void *data, size_t size)
{
    size_t n;
    unsigned char *bytes = get_file(path, &n);
    const int same = bytes && n == size && memcmp(bytes, data, size) == 0;
    free(bytes);
    return same;
}

// n (little-endian, 8 bytes), header, `data` bytes 0, 1, 2, ... in a block of exactly that size
static unsigned char *safetensors_n(const char *header, size_t header_size, size_t data, size_t *size)
{
    unsigned char *bytes = (unsigned char *)malloc(8 + header_size + data);
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)((uint64_t)header_size >> (8 * i));
    memcpy(bytes + 8, header, header_size);
    for (size_t i = 0; i < data; i++) bytes[8 + header_size + i] = (unsigned char)i;
    *size = 8 + header_size + data;
    return bytes;
}

static const char *shared_folder(void)
{
    const char *at = getenv("MIL_SHARED");
    return at ? at : "../shared";
}

static uint64_t draw_state = 1;
static uint64_t draw(void) { draw_state = draw_state * 6364136223846793005u + 1442695040888963407u; return draw_state >> 33; }

// ==== JSON ====

static int json_valid(mil_context *ctx, const char *text, size_t size)
{
    mili_json v;
    char *exact = (char *)malloc(size ? size : 1);         // so that a sanitizer sees a read past the end
    memcpy(exact, text, size);
    mil_error_clear(ctx);
    const int ok = mili_json_parse(ctx, "text", exact, size, 8, &v) == MIL_OK;
    CHECK(ok == (v.size > 0));
    if (!ok) CHECK(mil_error_status(ctx) == MIL_ERROR_FORMAT && strncmp(mil_error(ctx), "text: JSON: ", 12) == 0);
    free(exact);
    return ok;
}

TEST(json_accepts_what_the_grammar_allows)
{
    static const char *const texts[] = {
        "{}", "[]", " [ ] ", "0", "-0", "-0.5e+10", "1E5", "12345678901234567890123456789", "true", "false", "null", "\"\"", "\"a\"",
        "{\"a\":1}", "{\"a\":{\"b\":[1,2,{}]},\"c\":[]}\r\n\t ", "[[[[[[[[1]]]]]]]]", "[1,[],{},\"\",null]",
        "\"\\u0041\\uD83D\\uDE00\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"caf\xc3\xa9 \xe2\x98\x83 \xf0\x9f\x98\x80\"", "\"\x7f\"",
        "\"\xef\xbf\xbd\xf4\x8f\xbf\xbf\xed\x9f\xbf\xee\x80\x80\"", "\"\\u0000\"", "{\"\":{\"\":0}}", "[{\"a\":[]},{\"a\":[]}]" };
    mil_context *ctx = make_context();
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        if (!CHECK(json_valid(ctx, texts[i], strlen(texts[i])))) printf("  refused: %s (%s)\n", texts[i], mil_error(ctx));
    }
    end_context(ctx);
}

TEST(json_refuses_everything_else)
{
    static const char *const texts[] = {
        "", " ", "{", "[", "}", "]", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "[1,]", "[,1]", "[1 2]", "{,}", "{\"a\" 1}", "{a:1}", "{'a':1}",
        "{\"a\":1 \"b\":2}", "[1}", "{\"a\":1]", "01", "-", "+1", ".5", "1.", "1e", "1e+", "-01", "0x10", "1.e5", "NaN", "Infinity", "-Infinity",
        "tru", "True", "nul", "nulll", "falsey", "\"", "\"a", "\"\\\"", "\"\\x\"", "\"\\u12\"", "\"\\u12G4\"", "\"\\", "\"\\u", "\"\n\"", "\"\t\"",
        "\"\x01\"", "\"\\ud800\"", "\"\\udc00\"", "\"\\ud800\\u0041\"", "\"\\ud800x\"", "\"\\ud800\\ud800\"", "\"\\ud83d\\u\"", "\"\xff\"",
        "\"\xc3\"", "\"\xc3(\"", "\"\xc0\xaf\"", "\"\xe0\x80\xaf\"", "\"\xed\xa0\x80\"", "\"\xf0\x80\x80\xaf\"", "\"\xf4\x90\x80\x80\"",
        "\"\xf8\x88\x80\x80\x80\"", "\"\x80\"", "\"\xe2\x98\"", "\xef\xbb\xbf{}", "{} {}", "1 2", "{}x", "// c\n1", "/* c */1", "[1]//", "\xc2\xa0[]",
        "[[[[[[[[[1]]]]]]]]]", "{1:2}", "{\"a\":1,\"b\"}", "\"a\"b", "[\"a\":1]", ",", ":", "[1,,2]", "{\"a\"::1}", "1.5.5", "1e5e5", "--1", "\v1" };
    static const char nul[] = "[1,\0 2]", nul_in_string[] = "\"a\0b\"", nul_after[] = "1\0";
    mil_context *ctx = make_context();
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        if (!CHECK(!json_valid(ctx, texts[i], strlen(texts[i])))) printf("  accepted: %s\n", texts[i]);
    }
    CHECK(!json_valid(ctx, nul, sizeof nul - 1));
    CHECK(!json_valid(ctx, nul_in_string, sizeof nul_in_string - 1));
    CHECK(!json_valid(ctx, nul_after, sizeof nul_after - 1));
    end_context(ctx);
}

TEST(json_nested_200000_deep_is_refused_at_its_limit)
{
    mil_context *ctx = make_context();
    const size_t n = 200000;
    char *text = (char *)malloc(n * 5);
    for (int object = 0; object < 2; object++) {
        for (size_t i = 0; i < n; i++) memcpy(text + (object ? 5 : 1) * i, object ? "{\"a\":" : "[", object ? 5 : 1);
        CHECK(!json_valid(ctx, text, n * (object ? 5 : 1)));
        CHECK_CONTAINS(mil_error(ctx), "nested too deep");
    }
    mili_json v;                                           // a limit above what the checker has room for is cut to that
    memset(text, '[', 65);
    memset(text + 65, ']', 65);
    mil_error_clear(ctx);
    CHECK(mili_json_parse(ctx, "text", text, 130, 1000, &v) == MIL_ERROR_FORMAT);
    CHECK(mili_json_parse(ctx, "text", text + 1, 128, 1000, &v) == MIL_OK && mili_json_kind(v) == '[');
    free(text);
    end_context(ctx);
}

TEST(json_cut_anywhere_is_refused)
{
    static const char text[] = "{\"gate\": true, \"e\":[1,-2.5e3,null,\"\\ud83d\\ude00\xc3\xa9\"],\"o\":{\"k\":{}}}";
    mil_context *ctx = make_context();
    for (size_t n = 0; n < sizeof text - 1; n++) CHECK(!json_valid(ctx, text, n));
    CHECK(json_valid(ctx, text, sizeof text - 1));
    end_context(ctx);
}

TEST(json_values_are_found_and_read)
{
    static const char text[] = " {\"gate\": true, \"embed_dim\": 16 ,\"sizes\":[1, 2 ,-3],\"rate\":0.25,\"name\":\"a\\u0062\\n\\u00e9\\u2603\\ud83d\\ude00\","
                               "\"none\":null,\"off\":false,\"o\":{\"x\":[],\"y\":\"]}\\\"\"},\"emb\\u0065d\":7,\"empty\":\"\",\"mixed\":[1,2.0]}";
    mil_context *ctx = make_context();
    mili_json v, key, value;
    int64_t n = 0, ints[2] = { 0, 0 };
    double x = 0;
    int flag = 0, nul = 0;
    char name[32];
    CHECK(mili_json_parse(ctx, "config", text, sizeof text - 1, 4, &v) == MIL_OK);
    CHECK(mili_json_kind(v) == '{' && mili_json_count(v) == 11);
    CHECK(mili_json_bool(mili_json_find(v, "gate"), &flag) && flag == 1);
    CHECK(mili_json_bool(mili_json_find(v, "off"), &flag) && flag == 0);
    CHECK(!mili_json_bool(mili_json_find(v, "none"), &flag) && mili_json_is_null(mili_json_find(v, "none")));
    CHECK(mili_json_int(mili_json_find(v, "embed_dim"), &n) && n == 16);
    CHECK(mili_json_int(mili_json_find(v, "embed"), &n) && n == 7);
    CHECK(!mili_json_int(mili_json_find(v, "rate"), &n));
    CHECK(mili_json_double(mili_json_find(v, "rate"), &x) && x == 0.25);
    CHECK(mili_json_double(mili_json_find(v, "embed_dim"), &x) && x == 16);
    CHECK(!mili_json_double(mili_json_find(v, "name"), &x));
    CHECK(mili_json_ints(mili_json_find(v, "sizes"), ints, 2, &n) && n == 3 && ints[0] == 1 && ints[1] == 2);
    CHECK(!mili_json_ints(mili_json_find(v, "mixed"), NULL, 0, &n) && !mili_json_ints(mili_json_find(v, "o"), NULL, 0, &n));
    CHECK(mili_json_find(v, "nothing").size == 0 && mili_json_kind(mili_json_find(v, "nothing")) == 0);
    CHECK(mili_json_find(mili_json_find(v, "sizes"), "x").size == 0);
    CHECK(!mili_json_int(mili_json_find(v, "nothing"), &n) && mili_json_count(mili_json_find(v, "rate")) == 0);
    CHECK(mili_json_copy(mili_json_find(v, "name"), NULL, 0, &nul) == 12 && !nul);
    CHECK(mili_json_copy(mili_json_find(v, "name"), name, sizeof name, NULL) == 12);
    CHECK_STRING(name, "ab\n\xc3\xa9\xe2\x98\x83\xf0\x9f\x98\x80");
    CHECK(mili_json_copy(mili_json_find(v, "name"), name, 12, NULL) == 12 && name[0] == 0);
    CHECK(mili_json_copy(mili_json_find(v, "empty"), name, 1, NULL) == 0 && name[0] == 0);
    CHECK(mili_json_copy(mili_json_find(v, "rate"), name, sizeof name, NULL) == 0);
    CHECK(mili_json_equal(mili_json_find(v, "name"), "ab\n\xc3\xa9\xe2\x98\x83\xf0\x9f\x98\x80"));
    CHECK(!mili_json_equal(mili_json_find(v, "name"), "ab") && !mili_json_equal(mili_json_find(v, "empty"), "a"));
    CHECK(!mili_json_equal(mili_json_find(v, "rate"), "0.25"));
    mili_json_iter it = mili_json_begin(mili_json_find(v, "o"));
    CHECK(mili_json_next(&it, &key, &value) && mili_json_equal(key, "x") && value.size == 2);
    CHECK(mili_json_next(&it, &key, &value) && mili_json_equal(key, "y") && mili_json_equal(value, "]}\""));
    CHECK(!mili_json_next(&it, &key, &value) && !mili_json_next(&it, &key, &value));
    CHECK(mili_json_check_unique(ctx, "config", v) == MIL_OK);
    CHECK(mili_json_parse(ctx, "escapes", "\"\\b\\f\\n\\r\\t\\/\\u0041\"", 20, 1, &v) == MIL_OK && mili_json_copy(v, name, sizeof name, NULL) == 7);
    CHECK_STRING(name, "\b\f\n\r\t/A");
    CHECK(mili_json_parse(ctx, "nul", "\"a\\u0000b\"", 10, 1, &v) == MIL_OK);
    CHECK(mili_json_copy(v, NULL, 0, &nul) == 3 && nul && !mili_json_equal(v, "a"));
    end_context(ctx);
}

TEST(json_names_that_occur_twice_are_named)
{
    static const char *const texts[] = { "{\"a\":1,\"b\":2,\"a\":3}", "{\"ab\":1,\"x\":0,\"\\u0061b\":2}", "{\"\":1,\"\":2}", "{\"\\n\":1,\"\\u000a\":2}" };
    mil_context *ctx = make_context();
    mili_json v;
    for (int i = 0; i < 4; i++) {
        mil_error_clear(ctx);
        CHECK(mili_json_parse(ctx, "config", texts[i], strlen(texts[i]), 4, &v) == MIL_OK);
        CHECK(mili_json_check_unique(ctx, "config", v) == MIL_ERROR_FORMAT);
        CHECK_CONTAINS(mil_error(ctx), "occurs twice");
    }
    mil_error_clear(ctx);
    static const char different[] = "{\"a\":1,\"A\":2,\"aa\":3,\"\":4}";
    mil_error_clear(ctx);
    CHECK(mili_json_parse(ctx, "config", different, sizeof different - 1, 4, &v) == MIL_OK);
    CHECK(mili_json_check_unique(ctx, "config", v) == MIL_OK);
    end_context(ctx);
}

TEST(json_integers_are_exact_or_refused)
{
    static const struct { const char *text; int ok; int64_t value; } cases[] = {
        { "0", 1, 0 }, { "-1", 1, -1 }, { "9223372036854775807", 1, INT64_MAX }, { "-9223372036854775808", 1, INT64_MIN },
        { "9223372036854775808", 0, 0 }, { "-9223372036854775809", 0, 0 }, { "18446744073709551616", 0, 0 }, { "99999999999999999999", 0, 0 },
        { "-0", 0, 0 }, { "4.0", 0, 0 }, { "4e0", 0, 0 }, { "\"4\"", 0, 0 }, { "true", 0, 0 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        mili_json v;
        int64_t x = 0;
        v.text = cases[i].text;
        v.size = strlen(v.text);
        CHECK(mili_json_int(v, &x) == cases[i].ok && x == cases[i].value);
    }
}

static void check_double(const char *text)
{
    double x = 1, reference = strtod(text, NULL);
    const int ok = mili_parse_double(text, strlen(text), &x);
    if (!mili_is_finite_f64(reference)) { if (!CHECK(!ok)) printf("  %s\n", text); return; }
    if (!CHECK(ok && memcmp(&x, &reference, sizeof x) == 0)) printf("  %s: %.17g, not %.17g\n", text, x, reference);
}

// Bit for bit what strtod gives, which glibc rounds correctly: halfway cases, subnormals, overflow, and random numbers.
TEST(decimal_numbers_are_rounded_correctly)
{
    static const char *const texts[] = {
        "0", "-0", "0.0e5", "1", "-1", "0.1", "0.3", "1e22", "1e23", "9007199254740993", "9007199254740993.0000000000000000000000001",
        "9007199254740992.5", "4.9406564584124654e-324", "2.4703282292062327e-324", "2.4703282292062328e-324", "2.5e-324", "1e-400", "1e-999999999",
        "1.7976931348623157e308", "1.7976931348623158e308", "1.7976931348623159e308", "1e309", "1e999999999999999999999", "0e999999999999999999",
        "2.2250738585072014e-308", "2.2250738585072011e-308", "2.2250738585072009e-308", "0.000000000000000000000000000000000000000000000000001e51",
        "123456789012345678901234567890", "5e-324", "3e-324", "7.2057594037927933e16", "1e-5", "5e-05", "0.00020000000000000001", "1e0", "1E+2", "100e-2" };
    char text[1400];
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) check_double(texts[i]);
    for (int i = 0; i < 20000; i++) {
        const uint64_t bits = draw() << 33 ^ draw() << 11 ^ draw();
        double x;
        memcpy(&x, &bits, sizeof x);
        if (!mili_is_finite_f64(x)) continue;
        snprintf(text, sizeof text, "%.*e", (int)(draw() % 25), x);
        check_double(text);
        snprintf(text, sizeof text, "%u.%u%ue%d", (unsigned)draw(), (unsigned)draw(), (unsigned)draw(), (int)(draw() % 700) - 350);
        check_double(text);
    }
    memset(text, 0, sizeof text);                          // 2^-1075 exactly, 751 digits: a tie, then just above it
    snprintf(text, sizeof text, "%.1075f", ldexp(1, -1074));
    check_double(text);
    strcpy(text, "0.");
    memset(text + 2, '0', 400);
    memset(text + 402, '7', 900);
    check_double(text);
    memset(text, '9', 300);
    memset(text + 300, '0', 1000);
    strcpy(text + 1300, "e-1000");
    check_double(text);
    memset(text, 0, sizeof text);
    strcpy(text, "9007199254740993.");
    memset(text + 17, '0', 1000);
    check_double(text);
    text[1016] = '1';
    check_double(text);
}

TEST(numbers_are_written_short_and_read_back_the_same)
{
    static const struct { double x; const char *text; } cases[] = {
        { 0.1, "0.1" }, { 1, "1" }, { -2.5, "-2.5" }, { 1e-5, "1e-05" }, { 0.30000000000000004, "0.30000000000000004" }, { 0, "0" } };
    char text[32];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        mili_json_number(text, cases[i].x);
        CHECK_STRING(text, cases[i].text);
    }
    for (int i = 0; i < 2000; i++) {
        const uint64_t bits = draw() << 33 ^ draw() << 11 ^ draw();
        double x, back = 0;
        memcpy(&x, &bits, sizeof x);
        if (!mili_is_finite_f64(x)) continue;
        mili_json_number(text, x);
        CHECK(mili_parse_double(text, strlen(text), &back) && memcmp(&back, &x, sizeof x) == 0);
    }
}

TEST(json_strings_are_escaped)
{
    char text[64];
    CHECK(mili_json_string(text, sizeof text, "a\"\\\b\f\n\r\t\x01\x1f\x7f/\xc3\xa9") == 33);
    CHECK_STRING(text, "\"a\\\"\\\\\\b\\f\\n\\r\\t\\u0001\\u001f\x7f/\xc3\xa9\"");
    CHECK(mili_json_string(text, 4, "abc") == 5 && strcmp(text, "\"ab") == 0);
    CHECK(mili_json_string(NULL, 0, "abc") == 5);
}

TEST(index_sort_sorts)
{
    int64_t index[100];
    mili_tensor_entry entries[100];
    static char names[100][8];
    for (int n = 0; n <= 100; n++) {
        for (int i = 0; i < n; i++) {
            snprintf(names[i], sizeof names[i], "%d", (int)(draw() % 50));
            entries[i].name = names[i];
            index[i] = i;
        }
        mili_index_sort(index, n, mili_tensors_compare_names, entries);
        int seen[100] = { 0 };
        for (int i = 0; i < n; i++) {
            seen[index[i]]++;
            if (i) CHECK(strcmp(names[index[i - 1]], names[index[i]]) <= 0);
        }
        for (int i = 0; i < n; i++) CHECK(seen[i] == 1);
    }
}

// ==== safetensors, reading ====

#define E(name, dtype, shape, begin, end) "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"

typedef struct hostile { const char *header; size_t data; mil_status status; const char *sentence; } hostile;

// Opens from memory; a refusal must give the status, the sentence, and nothing left behind.
static void check_header(mil_context *ctx, const hostile *h)
{
    size_t size;
    unsigned char *bytes = safetensors_n(h->header, strlen(h->header), h->data, &size);
    mil_tensors *file = NULL;
    const size_t before = mil_context_bytes(ctx);
    const mil_status status = mil_tensors_open_memory(ctx, bytes, size, 0, &file);
    if (!CHECK(status == h->status)) printf("  %s: %s %s\n", h->header, mil_status_name(status), mil_error(ctx));
    CHECK((status == MIL_OK) == (file != NULL) && (status == MIL_OK) == (mil_error(ctx)[0] == 0));
    if (status != MIL_OK) CHECK_CONTAINS(mil_error(ctx), h->sentence);
    mil_tensors_free(file);
    CHECK(mil_context_bytes(ctx) == before);
    free(bytes);
}

TEST(safetensors_valid_oddities_are_read)
{
    static const hostile cases[] = {
        { "{}", 0, MIL_OK, "" },
        { "{}      ", 0, MIL_OK, "" },
        { "{\"__metadata__\":{}}", 0, MIL_OK, "" },
        { "{" E("", "F32", "[1]", "0", "4") "}", 4, MIL_OK, "" },
        { "{" E("a", "F32", "[]", "0", "4") "}", 4, MIL_OK, "" },
        { "{" E("a", "F32", "[0,3]", "0", "0") "}", 0, MIL_OK, "" },
        { "{" E("e", "I64", "[0]", "4", "4") "," E("b", "F16", "[2]", "4", "8") "," E("a", "U8", "[4]", "0", "4") "," E("z", "F64", "[5,0]", "8", "8") "}", 8, MIL_OK, "" },
        { "{ \"a\\u0062\\/c\" :\n\t{ \"shape\":[ 1 ] , \"data_offsets\" : [0,4],\"dtype\":\"F32\" } }  ", 4, MIL_OK, "" },
        { "{" E("a", "F\\u00332", "[1]", "0", "4") "}", 4, MIL_OK, "" },
        { "{\"\\u005f_metadata__\":{\"k\":\"v\"}}", 0, MIL_OK, "" },
        { "{" E("a", "BOOL", "[1,1,1,1,1,1,1,3]", "0", "3") "}", 3, MIL_OK, "" } };
    mil_context *ctx = make_context();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_header(ctx, &cases[i]);
    end_context(ctx);
}

TEST(safetensors_broken_rules_are_named)
{
    static const hostile cases[] = {
        // the text
        { "[]", 0, MIL_ERROR_FORMAT, "does not begin with {" },
        { " {}", 0, MIL_ERROR_FORMAT, "does not begin with {" },
        { "\xef\xbb\xbf{}", 0, MIL_ERROR_FORMAT, "does not begin with {" },
        { "", 0, MIL_ERROR_FORMAT, "does not begin with {" },
        { "{}\n", 0, MIL_ERROR_FORMAT, "only spaces may follow" },
        { "{} {}", 0, MIL_ERROR_FORMAT, "something follows" },
        { "{", 0, MIL_ERROR_FORMAT, "ends in the middle" },
        { "{" E("a", "U8", "[1]", "0", "1") ",}", 1, MIL_ERROR_FORMAT, "double quotes" },
        { "{'a':1}", 1, MIL_ERROR_FORMAT, "double quotes" },
        { "{/**/}", 0, MIL_ERROR_FORMAT, "double quotes" },
        { "{" E("\xff", "U8", "[1]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "UTF-8" },
        { "{" E("\\ud800", "U8", "[1]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "surrogate" },
        { "{" E("a", "U8", "[NaN]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "no value" },
        { "{" E("a", "U8", "[01]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "leading zero" },
        { "{\"a\":{\"b\":[[1]]}}", 0, MIL_ERROR_FORMAT, "nested too deep" },
        // names and fields
        { "{" E("a", "U8", "[1]", "0", "1") "," E("a", "U8", "[1]", "1", "2") "}", 2, MIL_ERROR_FORMAT, "tensor \"a\" stands twice" },
        { "{" E("a", "U8", "[1]", "0", "1") "," E("\\u0061", "U8", "[1]", "1", "2") "}", 2, MIL_ERROR_FORMAT, "tensor \"a\" stands twice" },
        { "{" E("a\\u0000b", "U8", "[1]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "\\u0000" },
        { "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, MIL_ERROR_FORMAT, "tensor \"a\": dtype stands twice" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"sh\\u0061pe\":[1],\"data_offsets\":[0,1]}}", 1, MIL_ERROR_FORMAT, "shape stands twice" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"data_offsets\":[0,1]}}", 1, MIL_ERROR_FORMAT, "data_offsets stands twice" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"strides\":[1]}}", 1, MIL_ERROR_FORMAT, "field \"strides\"" },
        { "{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, MIL_ERROR_FORMAT, "tensor \"a\": dtype is missing" },
        { "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, MIL_ERROR_FORMAT, "shape is missing" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, MIL_ERROR_FORMAT, "data_offsets is missing" },
        { "{\"a\":{}}", 0, MIL_ERROR_FORMAT, "dtype is missing" },
        { "{\"a\":1}", 0, MIL_ERROR_FORMAT, "its entry is not an object" },
        { "{\"a\":[]}", 0, MIL_ERROR_FORMAT, "its entry is not an object" },
        // metadata
        { "{\"__metadata__\":[]}", 0, MIL_ERROR_FORMAT, "__metadata__ is not an object" },
        { "{\"__metadata__\":\"x\"}", 0, MIL_ERROR_FORMAT, "__metadata__ is not an object" },
        { "{\"__metadata__\":{\"k\":1}}", 0, MIL_ERROR_FORMAT, "value of \"k\" is not a string" },
        { "{\"__metadata__\":{\"k\":null}}", 0, MIL_ERROR_FORMAT, "value of \"k\" is not a string" },
        { "{\"__metadata__\":{\"k\":{}}}", 0, MIL_ERROR_FORMAT, "value of \"k\" is not a string" },
        { "{\"__metadata__\":{\"k\":\"1\",\"\\u006b\":\"2\"}}", 0, MIL_ERROR_FORMAT, "occurs twice" },
        { "{\"__metadata__\":{},\"__metadata__\":{}}", 0, MIL_ERROR_FORMAT, "__metadata__ stands twice" },
        { "{\"__metadata__\":{\"k\":\"a\\u0000\"}}", 0, MIL_ERROR_FORMAT, "\\u0000" },
        // dtypes
        { "{" E("a", "f32", "[1]", "0", "4") "}", 4, MIL_ERROR_UNSUPPORTED, "tensor \"a\": dtype \"f32\" is unknown" },
        { "{" E("a", "", "[1]", "0", "4") "}", 4, MIL_ERROR_UNSUPPORTED, "is unknown" },
        { "{" E("a", "F8_E4M3", "[1]", "0", "1") "}", 1, MIL_ERROR_UNSUPPORTED, "\"F8_E4M3\" is not supported" },
        { "{" E("a", "C64", "[1]", "0", "8") "}", 8, MIL_ERROR_UNSUPPORTED, "\"C64\" is not supported" },
        { "{" E("a", "F4", "[2]", "0", "1") "}", 1, MIL_ERROR_UNSUPPORTED, "\"F4\" is not supported" },
        { "{\"a\":{\"dtype\":4,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, MIL_ERROR_FORMAT, "dtype is not a string" },
        // shapes
        { "{" E("a", "U8", "[-1]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "shape: \"-1\" is not a non-negative integer" },
        { "{" E("a", "U8", "[1.0]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "\"1.0\"" },
        { "{" E("a", "U8", "[1e0]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "\"1e0\"" },
        { "{" E("a", "U8", "[-0]", "0", "0") "}", 0, MIL_ERROR_FORMAT, "\"-0\"" },
        { "{" E("a", "U8", "[\"1\"]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "is not a non-negative integer" },
        { "{" E("a", "U8", "[null]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "null" },
        { "{" E("a", "U8", "1", "0", "1") "}", 1, MIL_ERROR_FORMAT, "shape is not an array" },
        { "{" E("a", "U8", "[18446744073709551616]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "that fits" },
        { "{" E("a", "U8", "[9223372036854775808]", "0", "1") "}", 1, MIL_ERROR_FORMAT, "that fits" },
        { "{" E("a", "U8", "[4294967296,4294967296]", "0", "0") "}", 0, MIL_ERROR_FORMAT, "overflows" },
        { "{" E("a", "U8", "[0,4294967296,4294967296]", "0", "0") "}", 0, MIL_ERROR_FORMAT, "overflows" },
        { "{" E("a", "F64", "[9223372036854775807]", "0", "8") "}", 8, MIL_ERROR_FORMAT, "overflows" },
        { "{" E("a", "F64", "[2305843009213693952]", "0", "0") "}", 0, MIL_ERROR_FORMAT, "overflows" },
        { "{" E("a", "U8", "[1,1,1,1,1,1,1,1,1]", "0", "1") "}", 1, MIL_ERROR_UNSUPPORTED, "rank 9 is above the 8" },
        // offsets
        { "{" E("a", "F32", "[2,3]", "0", "25") "}", 25, MIL_ERROR_FORMAT, "hold 25 bytes, but \"F32\" [2, 3] takes 24" },
        { "{" E("a", "F32", "[1]", "0", "3") "}", 3, MIL_ERROR_FORMAT, "hold 3 bytes" },
        { "{" E("a", "U8", "[1]", "1", "0") "}", 1, MIL_ERROR_FORMAT, "end before they begin" },
        { "{" E("a", "U8", "[2]", "0", "2") "}", 1, MIL_ERROR_FORMAT, "past the end of the file" },
        { "{" E("a", "U8", "[0]", "9223372036854775807", "9223372036854775807") "}", 1, MIL_ERROR_FORMAT, "past the end of the file" },
        { "{" E("a", "U8", "[1]", "18446744073709551615", "0") "}", 1, MIL_ERROR_FORMAT, "data_offsets" },
        { "{" E("a", "U8", "[1]", "-1", "0") "}", 1, MIL_ERROR_FORMAT, "not two non-negative integers" },
        { "{" E("a", "U8", "[1]", "0.0", "1") "}", 1, MIL_ERROR_FORMAT, "not two non-negative integers" },
        { "{" E("a", "U8", "[1]", "0", "1,1") "}", 1, MIL_ERROR_FORMAT, "not two non-negative integers" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, MIL_ERROR_FORMAT, "not two non-negative integers" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":{\"0\":1}}}", 1, MIL_ERROR_FORMAT, "not two non-negative integers" },
        { "{" E("a", "U8", "[1]", "0", "1") "," E("b", "U8", "[1]", "2", "3") "}", 3, MIL_ERROR_FORMAT, "tensor \"b\": data_offsets begin at 2 after a tensor, which ends at 1: a gap" },
        { "{" E("a", "U8", "[1]", "1", "2") "}", 2, MIL_ERROR_FORMAT, "a gap" },
        { "{" E("a", "U8", "[2]", "0", "2") "," E("b", "U8", "[2]", "1", "3") "}", 3, MIL_ERROR_FORMAT, "they overlap" },
        { "{" E("a", "U8", "[2]", "0", "2") "," E("b", "U8", "[2]", "0", "2") "}", 2, MIL_ERROR_FORMAT, "they overlap" },
        { "{" E("a", "U8", "[4]", "0", "4") "," E("e", "U8", "[0]", "2", "2") "}", 4, MIL_ERROR_FORMAT, "they overlap" },
        { "{" E("a", "U8", "[1]", "0", "1") "}", 2, MIL_ERROR_FORMAT, "1 bytes after the last tensor" },
        { "{}", 3, MIL_ERROR_FORMAT, "3 bytes after the last tensor" } };
    mil_context *ctx = make_context();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_header(ctx, &cases[i]);
    end_context(ctx);
}

TEST(safetensors_lengths_are_checked)
{
    static const struct { uint64_t n; size_t size; const char *sentence; } cases[] = {
        { 0, 0, "0 bytes" }, { 2, 7, "7 bytes" }, { 0, 8, "begin with {" }, { 3, 10, "past the end" }, { 1, 8, "past the end" },
        { (uint64_t)1 << 63, 10, "above the format's" }, { UINT64_MAX, 10, "above the format's" }, { UINT64_MAX - 7, 10, "above" },
        { 100000001, 10, "above the format's" }, { 100000000, 10, "past the end" } };
    mil_context *ctx = make_context();
    mil_tensors *file;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        unsigned char all[10] = { 0, 0, 0, 0, 0, 0, 0, 0, '{', '}' };
        unsigned char *bytes = (unsigned char *)malloc(cases[i].size + 1);
        for (int b = 0; b < 8; b++) all[b] = (unsigned char)(cases[i].n >> (8 * b));
        memcpy(bytes, all, cases[i].size);
        CHECK(mil_tensors_open_memory(ctx, bytes, cases[i].size, 0, &file) == MIL_ERROR_FORMAT && file == NULL);
        CHECK_CONTAINS(mil_error(ctx), cases[i].sentence);
        free(bytes);
    }
    CHECK(mil_tensors_open_memory(ctx, "PK\3\4aaaaaaaaa", 13, 0, &file) == MIL_ERROR_FORMAT);
    CHECK_CONTAINS(mil_error(ctx), "a zip");
    CHECK(mil_tensors_open_memory(ctx, "slide,label\n1,0\n", 16, 0, &file) == MIL_ERROR_FORMAT);
    CHECK_CONTAINS(mil_error(ctx), "(no safetensors file?)");
    CHECK(mil_tensors_open_memory(ctx, "\x89HDF\r\n\x1a\n....", 12, 0, &file) == MIL_ERROR_FORMAT);
    CHECK_CONTAINS(mil_error(ctx), "HDF5");
    CHECK(mil_tensors_open_memory(ctx, NULL, 12, 0, &file) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_open_memory(ctx, "", 0, 0, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_open_memory(NULL, "", 0, 0, &file) == MIL_ERROR_ARGUMENT);
    end_context(ctx);
}

static const char sample[] = "{\"__metadata__\":{\"format\":\"pt\",\"note\":\"caf\\u00e9 \\\"q\\\"\"}," E("w", "F32", "[2,3]", "0", "24") ","
    E("h.x", "F16", "[3]", "24", "30") "," E("i", "I64", "[]", "30", "38") "," E("u", "U8", "[5]", "38", "43") "," E("e", "F32", "[0,4]", "43", "43") "}";
#define SAMPLE_DATA 43

TEST(safetensors_tensors_and_metadata_are_found)
{
    mil_context *ctx = make_context();
    size_t size;
    unsigned char *bytes = safetensors_n(sample, sizeof sample - 1, SAMPLE_DATA, &size);
    const unsigned char *data = bytes + 8 + sizeof sample - 1;
    mil_tensors *file;
    CHECK(mil_tensors_open_memory(ctx, bytes, size, 0, &file) == MIL_OK);
    if (!file) { printf("%s\n", mil_error(ctx)); return; }
    CHECK(mil_tensors_count(file) == 5 && mil_tensors_meta_count(file) == 2);
    CHECK_STRING(mil_tensors_name(file, 0), "w");
    CHECK_STRING(mil_tensors_name(file, 1), "h.x");
    CHECK_STRING(mil_tensors_dtype(file, 1), "F16");
    CHECK(mil_tensors_name(file, 5) == NULL && mil_tensors_name(file, -1) == NULL && mil_tensors_at(file, 5) == NULL);
    CHECK(mil_tensors_find(file, "u") == 3 && mil_tensors_find(file, "h") == -1 && mil_tensors_find(file, NULL) == -1);
    CHECK(mil_tensors_get(file, "zz") == NULL && mil_tensors_bytes(file, 3) == 5 && mil_tensors_bytes(file, 9) == 0);
    const mil_tensor *w = mil_tensors_get(file, "w"), *i = mil_tensors_get(file, "i"), *e = mil_tensors_get(file, "e");
    CHECK(w && w->dtype == MIL_F32 && w->rank == 2 && w->shape[0] == 2 && w->shape[1] == 3 && w->stride[0] == 0);
    CHECK(i && i->rank == 0 && mil_tensor_count(i) == 1);
    CHECK(e && mil_tensor_count(e) == 0);
#if MILI_BIG_ENDIAN
    int64_t value;
    memcpy(&value, i->data, 8);
    CHECK(((unsigned char *)i->data)[0] == data[37] && ((unsigned char *)w->data)[3] == data[0]);
    CHECK(((unsigned char *)mil_tensors_get(file, "u")->data)[0] == data[38]);
#else
    CHECK(w->data == data && i->data == data + 30);
#endif
    CHECK_STRING(mil_tensors_meta_key(file, 1), "note");
    CHECK_STRING(mil_tensors_meta_value(file, 0), "pt");
    CHECK_STRING(mil_tensors_meta(file, "note"), "caf\xc3\xa9 \"q\"");
    CHECK(mil_tensors_meta(file, "x") == NULL && mil_tensors_meta(file, NULL) == NULL && mil_tensors_meta_key(file, 2) == NULL);
    CHECK(mil_tensors_meta_value(file, -1) == NULL && mil_tensors_dtype(file, 7) == NULL);
    mil_tensors_free(file);
    mil_tensors_free(NULL);
    CHECK(mil_tensors_count(NULL) == 0 && mil_tensors_find(NULL, "a") == -1 && mil_tensors_at(NULL, 0) == NULL);
    free(bytes);
    end_context(ctx);
}

TEST(safetensors_foreign_dtypes_can_be_listed)
{
    static const char text[] = "{" E("a", "F8_E4M3", "[2]", "0", "2") "," E("b", "F4", "[4]", "2", "4") "," E("c", "Q9", "[7]", "4", "9") ","
                               E("d", "F32", "[1]", "9", "13") "}";
    static const char wrong[] = "{" E("a", "F8_E5M2", "[2]", "0", "3") "}", odd[] = "{" E("a", "F4", "[3]", "0", "2") "}";
    mil_context *ctx = make_context();
    size_t size;
    unsigned char *bytes = safetensors_n(text, sizeof text - 1, 13, &size);
    mil_tensors *file;
    CHECK(mil_tensors_open_memory(ctx, bytes, size, 0, &file) == MIL_ERROR_UNSUPPORTED);
    CHECK(mil_tensors_open_memory(ctx, bytes, size, MIL_FILE_LIST_ONLY, &file) == MIL_OK);
    CHECK_STRING(mil_tensors_dtype(file, 0), "F8_E4M3");
    CHECK_STRING(mil_tensors_dtype(file, 2), "Q9");
    CHECK(mil_tensors_at(file, 0)->data == NULL && mil_tensors_at(file, 0)->dtype == MIL_DTYPE_COUNT && mil_tensors_bytes(file, 2) == 5);
    CHECK(mil_tensors_at(file, 2)->shape[0] == 7 && mil_tensors_get(file, "d")->data != NULL);
    mil_tensors_free(file);
    free(bytes);
    bytes = safetensors_n(wrong, sizeof wrong - 1, 3, &size);
    CHECK(mil_tensors_open_memory(ctx, bytes, size, MIL_FILE_LIST_ONLY, &file) == MIL_ERROR_FORMAT);
    free(bytes);
    bytes = safetensors_n(odd, sizeof odd - 1, 2, &size);
    CHECK(mil_tensors_open_memory(ctx, bytes, size, MIL_FILE_LIST_ONLY, &file) == MIL_ERROR_FORMAT);
    free(bytes);
    end_context(ctx);
}

TEST(safetensors_thousands_of_tensors_take_memory_in_proportion)
{
    mil_context *ctx = make_context();
    const int n = 5000;
    char *text = (char *)malloc((size_t)n * 100);
    size_t at = 1, size;
    text[0] = '{';
    for (int i = 0; i < n; i++)
        at += (size_t)sprintf(text + at, "%s\"t%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}", i ? "," : "", i * 7919 % n, i, i + 1);
    text[at++] = '}';
    unsigned char *bytes = safetensors_n(text, at, (size_t)n, &size);
    mil_tensors *file;
    CHECK(mil_tensors_open_memory(ctx, bytes, size, 0, &file) == MIL_OK);
    CHECK(mil_context_peak_bytes(ctx) < 8 * size + 65536);
    for (int i = 0; i < n; i++) {
        char name[16];
        snprintf(name, sizeof name, "t%d", i);
        const int64_t index = mil_tensors_find(file, name);
        CHECK(index >= 0 && strcmp(mil_tensors_name(file, index), name) == 0);
    }
    mil_tensors_free(file);
    free(bytes);
    free(text);
    end_context(ctx);
}

// Random damage: never a crash, and what is accepted still covers its data exactly.
TEST(safetensors_and_npy_survive_random_damage)
{
    static const char npy[] = "\x93NUMPY\1\0\x46\0{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3L), }          \n012345678901234567890123";
    static const char tokens[][8] = { "0", "-1", "{", "}", "[", "]", "\"", ",", ":", "\\u0000", "1e9", "9999999", "F64", "\xff" };
    mil_context *ctx = make_context();
    size_t sizes[2] = { 0, sizeof npy - 1 };
    unsigned char *originals[2];
    originals[0] = safetensors_n(sample, sizeof sample - 1, SAMPLE_DATA, &sizes[0]);
    originals[1] = (unsigned char *)malloc(sizeof npy);
    memcpy(originals[1], npy, sizeof npy);
    int accepted = 0;
    for (int round = 0; round < 30000; round++) {
        const int which = round & 1;
        size_t size = sizes[which];
        unsigned char *bytes = (unsigned char *)malloc(size);
        memcpy(bytes, originals[which], size);
        for (uint64_t k = 1 + draw() % 3; k; k--) {
            const char *token = tokens[draw() % 14];
            const size_t at = draw() % size, n = strlen(token);
            if (draw() % 2) bytes[at] = (unsigned char)draw();
            else if (at + n <= size) memcpy(bytes + at, token, n);
        }
        if (draw() % 8 == 0) { size = draw() % size; bytes = (unsigned char *)realloc(bytes, size ? size : 1); }
        if (which == 0) {
            mil_tensors *file;
            if (mil_tensors_open_memory(ctx, bytes, size, draw() % 2 ? MIL_FILE_LIST_ONLY : 0, &file) == MIL_OK) {
                unsigned sum = 0;
                accepted++;
                for (int64_t i = 0; i < mil_tensors_count(file); i++) {
                    const unsigned char *p = (const unsigned char *)mil_tensors_at(file, i)->data;
                    for (size_t b = 0; p && b < mil_tensors_bytes(file, i); b++) sum += p[b];
                }
                CHECK(sum < 255 * 4096);
                mil_tensors_free(file);
            } else CHECK(mil_error(ctx)[0] != 0 && file == NULL);
        } else {
            mil_npy *file;
            if (mil_npy_open_memory(ctx, bytes, size, 0, &file) == MIL_OK) {
                const mil_tensor *t = mil_npy_tensor(file);
                const unsigned char *p = (const unsigned char *)t->data;
                unsigned sum = 0;
                accepted++;
                for (size_t b = 0; b < (size_t)mil_tensor_count(t) * mil_dtype_size(t->dtype); b++) sum += p[b];
                CHECK(sum < 255 * 4096);
                mil_npy_free(file);
            } else CHECK(mil_error(ctx)[0] != 0 && file == NULL);
        }
        free(bytes);
    }
    CHECK(accepted > 100);
    free(originals[0]);
    free(originals[1]);
    end_context(ctx);
}

// ==== safetensors, writing ====

static float    w_values[6] = { 0, 1, 2, 3, 4, 5 };
static uint16_t h_values[3] = { 0x3c00, 0x4000, 0x4200 };
static int64_t  i_values[1] = { -7 };
static int32_t  j_values[2] = { 1, 2 };
static uint8_t  u_values[5] = { 1, 2, 3, 4, 5 };

static int make_sample(mil_tensor *t, const char **names)
{
    const int64_t two_three[] = { 2, 3 }, three[] = { 3 }, five[] = { 5 }, empty[] = { 0, 4 }, two[] = { 2 };
    t[0] = mil_tensor_make(u_values, MIL_U8, 1, five);          names[0] = "u";
    t[1] = mil_tensor_make(w_values, MIL_F32, 2, two_three);    names[1] = "w";
    t[2] = mil_tensor_make(i_values, MIL_I64, 0, NULL);         names[2] = "i";
    t[3] = mil_tensor_make(h_values, MIL_F16, 1, three);        names[3] = "a \"q\"\n\xc3\xa9";
    t[4] = mil_tensor_make(NULL, MIL_F32, 2, empty);            names[4] = "";
    t[5] = mil_tensor_make(j_values, MIL_I32, 1, two);          names[5] = "x";
    return 6;
}

static unsigned char *write_sample(mil_context *ctx, size_t *size, const mil_meta *meta, int64_t meta_count, int reversed)
{
    mil_tensor t[6], swap_tensor;
    const char *names[6], *swap_name;
    const int n = make_sample(t, names);
    for (int i = 0; reversed && i < n / 2; i++) {
        swap_tensor = t[i]; t[i] = t[n - 1 - i]; t[n - 1 - i] = swap_tensor;
        swap_name = names[i]; names[i] = names[n - 1 - i]; names[n - 1 - i] = swap_name;
    }
    *size = 0;
    if (!CHECK(mil_tensors_write_memory(ctx, t, names, n, meta, meta_count, NULL, size) == MIL_OK)) { printf("%s\n", mil_error(ctx)); return NULL; }
    unsigned char *bytes = (unsigned char *)malloc(*size);
    size_t room = *size - 1;
    bytes[0] = 99;
    CHECK(mil_tensors_write_memory(ctx, t, names, n, meta, meta_count, bytes, &room) == MIL_ERROR_ARGUMENT && room == *size && bytes[0] == 99);
    CHECK(mil_tensors_write_memory(ctx, t, names, n, meta, meta_count, bytes, &room) == MIL_OK && room == *size);
    return bytes;
}

TEST(safetensors_written_reads_back_the_same)
{
    mil_context *ctx = make_context();
    const mil_meta meta[] = { { "model", "abmil" }, { "config", "{\"a\": \"\\\\ \xe2\x98\x83\"}" }, { "zz", "" } };
    size_t size;
    unsigned char *bytes = write_sample(ctx, &size, meta, 3, 0);
    mil_tensors *file;
    CHECK(mil_tensors_open_memory(ctx, bytes, size, 0, &file) == MIL_OK);
    if (!file) { printf("%s\n", mil_error(ctx)); return; }
    mil_tensor t[6];
    const char *names[6];
    const int n = make_sample(t, names);
    CHECK(mil_tensors_count(file) == n && mil_tensors_meta_count(file) == 4);
    for (int i = 0; i < n; i++) {
        const mil_tensor *r = mil_tensors_get(file, names[i]);
        if (!CHECK(r != NULL)) continue;
        CHECK(r->dtype == t[i].dtype && r->rank == t[i].rank && memcmp(r->shape, t[i].shape, sizeof r->shape) == 0);
        const size_t m = (size_t)mil_tensor_count(r) * mil_dtype_size(r->dtype);
        CHECK(m == 0 || memcmp(r->data, t[i].data, m) == 0);
    }
    CHECK_STRING(mil_tensors_meta(file, "format"), "pt");
    for (int i = 0; i < 3; i++) CHECK_STRING(mil_tensors_meta(file, meta[i].key), meta[i].value);
    // larger elements first, then by the reference's order of dtypes, then by name
    static const char *const order[] = { "i", "", "w", "x", "a \"q\"\n\xc3\xa9", "u" };
    for (int i = 0; i < n; i++) CHECK_STRING(mil_tensors_name(file, i), order[i]);
    CHECK((8 + mili_read_le(bytes, 8)) % 8 == 0);
    mil_tensors_free(file);
    free(bytes);
    end_context(ctx);
}

TEST(safetensors_written_twice_or_in_another_order_is_byte_identical)
{
    mil_context *ctx = make_context();
    const mil_meta meta[] = { { "b", "2" }, { "a", "1" }, { "g", "3" } }, other[] = { { "g", "3" }, { "a", "1" }, { "b", "2" } };
    size_t n[3];
    unsigned char *bytes[3];
    for (int i = 0; i < 3; i++) bytes[i] = write_sample(ctx, &n[i], i == 2 ? other : meta, 3, i == 2);
    for (int i = 1; i < 3; i++) CHECK(n[i] == n[0] && memcmp(bytes[i], bytes[0], n[0]) == 0);
    static const char head[] = "{\"__metadata__\":{\"a\":\"1\",\"b\":\"2\",\"format\":\"pt\",\"g\":\"3\"},\"i\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]},"
                               "\"\":{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[8,8]},";
    CHECK(memcmp(bytes[0] + 8, head, sizeof head - 1) == 0);
    for (int i = 0; i < 3; i++) free(bytes[i]);
    end_context(ctx);
}

TEST(safetensors_format_can_be_given_and_nothing_is_a_file_too)
{
    mil_context *ctx = make_context();
    const mil_meta meta[] = { { "format", "mil-case/1" } };
    unsigned char bytes[256];
    size_t size = sizeof bytes;
    mil_tensors *file;
    CHECK(mil_tensors_write_memory(ctx, NULL, NULL, 0, meta, 1, bytes, &size) == MIL_OK && size == 48);
    CHECK(memcmp(bytes + 8, "{\"__metadata__\":{\"format\":\"mil-case/1\"}}", 40) == 0);
    CHECK(mil_tensors_open_memory(ctx, bytes, size, 0, &file) == MIL_OK && mil_tensors_count(file) == 0);
    mil_tensors_free(file);
    size = sizeof bytes;
    CHECK(mil_tensors_write_memory(ctx, NULL, NULL, 0, NULL, 0, bytes, &size) == MIL_OK);
    CHECK(memcmp(bytes + 8, "{\"__metadata__\":{\"format\":\"pt\"}}", 32) == 0);
    end_context(ctx);
}

TEST(safetensors_strided_tensors_are_written_packed)
{
    mil_context *ctx = make_context();
    float x[4][5], packed[3000];
    static float big[3000][2];
    unsigned char bytes[16384];
    size_t size = sizeof bytes;
    const char *name = "t";
    const int64_t shape[] = { 5, 4 }, long_shape[] = { 3000 };
    mil_tensors *file;
    for (int i = 0; i < 20; i++) x[i / 5][i % 5] = (float)i;
    for (int i = 0; i < 3000; i++) { big[i][1] = (float)i; big[i][0] = -1; packed[i] = (float)i; }
    mil_tensor t = mil_tensor_make(x, MIL_F32, 2, shape);  // the transpose
    t.stride[0] = 4;
    t.stride[1] = 20;
    CHECK(mil_tensors_write_memory(ctx, &t, &name, 1, NULL, 0, bytes, &size) == MIL_OK);
    CHECK(mil_tensors_open_memory(ctx, bytes, size, 0, &file) == MIL_OK);
    float y[20];
    memcpy(y, mil_tensors_at(file, 0)->data, sizeof y);
    for (int i = 0; i < 5; i++) for (int j = 0; j < 4; j++) CHECK(y[i * 4 + j] == x[j][i]);
    mil_tensors_free(file);
    t = mil_tensor_make(&big[2999][1], MIL_F32, 1, long_shape);    // backwards, and longer than one piece
    t.stride[0] = -8;
    size = sizeof bytes;
    CHECK(mil_tensors_write_memory(ctx, &t, &name, 1, NULL, 0, bytes, &size) == MIL_OK);
    CHECK(mil_tensors_open_memory(ctx, bytes, size, 0, &file) == MIL_OK);
    for (int i = 0; i < 3000; i++) {
        float v;
        memcpy(&v, (const char *)mil_tensors_at(file, 0)->data + 4 * i, 4);
        CHECK(v == packed[2999 - i]);
    }
    mil_tensors_free(file);
    end_context(ctx);
}

TEST(safetensors_writer_checks_its_arguments)
{
    mil_context *ctx = make_context();
    mil_tensor t[6];
    const char *names[6];
    const int n = make_sample(t, names);
    size_t size = 0;
    const mil_meta twice[] = { { "a", "1" }, { "a", "2" } }, null_key[] = { { NULL, "1" } }, null_value[] = { { "k", NULL } }, bad[] = { { "k", "\xff" } };
#define REFUSED(sentence, call) do { CHECK((call) == MIL_ERROR_ARGUMENT); CHECK_CONTAINS(mil_error(ctx), sentence); } while (0)
    REFUSED("\"a\" is given twice", mil_tensors_write_memory(ctx, t, names, n, twice, 2, NULL, &size));
    REFUSED("NULL or not UTF-8", mil_tensors_write_memory(ctx, t, names, n, null_key, 1, NULL, &size));
    REFUSED("NULL or not UTF-8", mil_tensors_write_memory(ctx, t, names, n, null_value, 1, NULL, &size));
    REFUSED("NULL or not UTF-8", mil_tensors_write_memory(ctx, t, names, n, bad, 1, NULL, &size));
    REFUSED("size is NULL", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, NULL));
    REFUSED("negative count", mil_tensors_write_memory(ctx, t, names, -1, NULL, 0, NULL, &size));
    REFUSED("negative count", mil_tensors_write_memory(ctx, NULL, names, n, NULL, 0, NULL, &size));
    REFUSED("negative count", mil_tensors_write_memory(ctx, t, names, n, NULL, 1, NULL, &size));
    names[0] = "w";
    REFUSED("\"w\" is given twice", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, &size));
    names[0] = "__metadata__";
    REFUSED("reserved", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, &size));
    names[0] = "\xed\xa0\x80";
    REFUSED("UTF-8", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, &size));
    names[0] = NULL;
    REFUSED("NULL", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, &size));
    names[0] = "u";
    t[0].data = NULL;
    REFUSED("data is NULL", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, &size));
    t[0].rank = 9;
    REFUSED("rank", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, &size));
    t[0].rank = 1;
    t[0].dtype = MIL_DTYPE_COUNT;
    REFUSED("dtype", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, &size));
    t[0].dtype = MIL_U8;
    t[0].shape[0] = -1;
    REFUSED("shape", mil_tensors_write_memory(ctx, t, names, n, NULL, 0, NULL, &size));
    for (int i = 0; i < 2; i++) {                          // only their shapes are looked at
        t[i] = mil_tensor_make(u_values, MIL_F64, 0, NULL);
        t[i].rank = 1;
        t[i].shape[0] = (int64_t)MILI_MIN((uint64_t)SIZE_MAX / 16, (uint64_t)INT64_MAX / 16);
    }
    REFUSED("together are too large", mil_tensors_write_memory(ctx, t, names, 2, NULL, 0, NULL, &size));
    CHECK(mil_tensors_write_memory(NULL, t, names, n, NULL, 0, NULL, &size) == MIL_ERROR_ARGUMENT);
    end_context(ctx);
}

// ==== NPY ====

// version, dict, data bytes 0, 1, 2, ...; the header is padded as NumPy does (raw 0), ends with a newline only (1), or just ends (2)
static unsigned char *npy_bytes(int major, const char *dict, size_t data, int raw, size_t *size)
{
    const size_t start = major == 1 ? 10 : 12;
    size_t header = strlen(dict);
    if (!raw) header = (start + header + 1 + 63) / 64 * 64 - start;
    if (raw == 1) header++;
    unsigned char *bytes = (unsigned char *)malloc(start + header + data);
    memcpy(bytes, "\x93NUMPY", 6);
    bytes[6] = (unsigned char)major;
    bytes[7] = 0;
    for (size_t i = 8; i < start; i++) bytes[i] = (unsigned char)(header >> (8 * (i - 8)));
    memset(bytes + start, ' ', header);
    memcpy(bytes + start, dict, strlen(dict));
    if (raw < 2) bytes[start + header - 1] = '\n';
    for (size_t i = 0; i < data; i++) bytes[start + header + i] = (unsigned char)i;
    *size = start + header + data;
    return bytes;
}

#define D(descr, fortran, shape) "{'descr': '" descr "', 'fortran_order': " fortran ", 'shape': " shape ", }"

TEST(npy_valid_headers_are_read)
{
    static const struct { int major; const char *dict; size_t data; mil_dtype dtype; int rank; int64_t first; int raw; } cases[] = {
        { 1, D("<f4", "False", "(2, 3)"), 24, MIL_F32, 2, 2, 0 },
        { 2, D("<f4", "False", "(2, 3)"), 24, MIL_F32, 2, 2, 0 },
        { 3, D("<f4", "False", "(2, 3)"), 24, MIL_F32, 2, 2, 0 },
        { 1, D("<f8", "False", "()"), 8, MIL_F64, 0, 0, 0 },
        { 1, D("<f2", "False", "(4,)"), 8, MIL_F16, 1, 4, 0 },
        { 1, D("|b1", "False", "(3,)"), 3, MIL_BOOL, 1, 3, 0 },
        { 1, D("|u1", "False", "(1,1,1,1,1,1,1,3)"), 3, MIL_U8, 8, 1, 0 },
        { 1, D("<i1", "False", "(3,)"), 3, MIL_I8, 1, 3, 0 },
        { 1, D("<i8", "False", "(0, 4)"), 0, MIL_I64, 2, 0, 0 },
        { 1, D("<u2", "False", "(300L, 1L)"), 600, MIL_U16, 2, 300, 0 },
        { 1, "{'shape':(2,3,),  \"descr\":'<i4','fortran_order':False}", 24, MIL_I32, 2, 2, 0 },
        { 1, "{\"shape\" : ( 2 , 3 ) ,\n\"descr\":\"<u4\",'fortran_order' : False}", 24, MIL_U32, 2, 2, 1 },
        { 1, "{'shape':(0,0),'descr':'<u8','fortran_order':True}", 0, MIL_U64, 2, 0, 1 },
        { 1, "{'shape':(1,),'descr':'<i2','fortran_order':True}", 2, MIL_I16, 1, 1, 1 } };
    mil_context *ctx = make_context();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t size;
        unsigned char *bytes = npy_bytes(cases[i].major, cases[i].dict, cases[i].data, cases[i].raw, &size);
        mil_npy *npy;
        if (CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == MIL_OK)) {
            const mil_tensor *t = mil_npy_tensor(npy);
            CHECK(t->dtype == cases[i].dtype && t->rank == cases[i].rank && t->shape[0] == cases[i].first && t->stride[0] == 0);
            CHECK_STRING(mil_npy_warning(npy), "");
            if (!MILI_BIG_ENDIAN && cases[i].data) CHECK(t->data == bytes + size - cases[i].data);
        } else printf("  %s: %s\n", cases[i].dict, mil_error(ctx));
        mil_npy_free(npy);
        free(bytes);
    }
    mil_npy_free(NULL);
    CHECK(mil_npy_tensor(NULL) == NULL);
    end_context(ctx);
}

TEST(npy_broken_rules_are_named)
{
    static const struct { const char *dict; size_t data; mil_status status; const char *sentence; } cases[] = {
        { "", 0, MIL_ERROR_FORMAT, "not a dict" },
        { "[]", 0, MIL_ERROR_FORMAT, "not a dict" },
        { "{}", 0, MIL_ERROR_FORMAT, "descr is missing" },
        { "{'descr': '<f4', 'shape': (1,)}", 4, MIL_ERROR_FORMAT, "fortran_order is missing" },
        { "{'descr': '<f4', 'fortran_order': False}", 4, MIL_ERROR_FORMAT, "shape is missing" },
        { "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}", 4, MIL_ERROR_FORMAT, "key \"x\"" },
        { "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", 4, MIL_ERROR_FORMAT, "descr stands twice" },
        { "{'descr': '<f4' 'fortran_order': False, 'shape': (1,)}", 4, MIL_ERROR_FORMAT, "not a dict" },
        { "{'descr' '<f4'}", 4, MIL_ERROR_FORMAT, "no :" },
        { "{descr: '<f4'}", 4, MIL_ERROR_FORMAT, "not a dict" },
        { D("<f4", "False", "(1,)") "x", 4, MIL_ERROR_FORMAT, "something follows" },
        { D("<f4", "False", "(1,)") " # c", 4, MIL_ERROR_FORMAT, "something follows" },
        { D("<f4", "0", "(1,)"), 4, MIL_ERROR_FORMAT, "not True or False" },
        { D("<f4", "'False'", "(1,)"), 4, MIL_ERROR_FORMAT, "not True or False" },
        { D("<f4", "False", "(1)"), 4, MIL_ERROR_FORMAT, "not a tuple" },
        { D("<f4", "False", "[1]"), 4, MIL_ERROR_FORMAT, "not a tuple" },
        { D("<f4", "False", "1"), 4, MIL_ERROR_FORMAT, "not a tuple" },
        { D("<f4", "False", "(,)"), 4, MIL_ERROR_FORMAT, "not an integer" },
        { D("<f4", "False", "(1,,2)"), 8, MIL_ERROR_FORMAT, "not an integer" },
        { D("<f4", "False", "(1 2)"), 8, MIL_ERROR_FORMAT, "tuple" },
        { D("<f4", "False", "(-1,)"), 4, MIL_ERROR_FORMAT, "negative" },
        { D("<f4", "False", "(1.0,)"), 4, MIL_ERROR_FORMAT, "tuple" },
        { D("<f4", "False", "('1',)"), 4, MIL_ERROR_FORMAT, "not an integer" },
        { D("<f4", "False", "(01,)"), 4, MIL_ERROR_FORMAT, "not an integer" },
        { D("<f4", "False", "(True,)"), 4, MIL_ERROR_FORMAT, "not an integer" },
        { D("<f4", "False", "(1_0,)"), 40, MIL_ERROR_FORMAT, "tuple" },
        { D("<f4", "False", "(9223372036854775808,)"), 4, MIL_ERROR_FORMAT, "does not fit" },
        { D("<f4", "False", "(99999999999999999999999,)"), 4, MIL_ERROR_FORMAT, "does not fit" },
        { D("<f4", "False", "(4294967296, 4294967296)"), 4, MIL_ERROR_FORMAT, "overflows" },
        { D("<f4", "False", "(0, 4294967296, 4294967296)"), 0, MIL_ERROR_FORMAT, "overflows" },
        { D("<f8", "False", "(2305843009213693952,)"), 0, MIL_ERROR_FORMAT, "overflows" },
        { D("<f4", "False", "(1,1,1,1,1,1,1,1,1)"), 4, MIL_ERROR_UNSUPPORTED, "rank above 8" },
        { D("<f4", "False", "(2,"), 4, MIL_ERROR_FORMAT, "not an integer" },
        { D("<f4", "False", "(2, 3)"), 23, MIL_ERROR_FORMAT, "23 bytes of data, but F32 [2, 3] takes 24" },
        { D("<f4", "False", "(100000, 100)"), 23, MIL_ERROR_FORMAT, "takes 40000000" },
        { D("=f4", "False", "(1,)"), 4, MIL_ERROR_FORMAT, "byte order" },
        { D("f4", "False", "(1,)"), 4, MIL_ERROR_FORMAT, "byte order" },
        { D("|f4", "False", "(1,)"), 4, MIL_ERROR_FORMAT, "one byte" },
        { D("", "False", "(1,)"), 4, MIL_ERROR_FORMAT, "byte order" },
        { D("<q8", "False", "(1,)"), 8, MIL_ERROR_FORMAT, "no type" },
        { D("<f16", "False", "(1,)"), 16, MIL_ERROR_UNSUPPORTED, "width" },
        { D("|O", "False", "(1,)"), 8, MIL_ERROR_UNSUPPORTED, "pickle" },
        { D("<V2", "False", "(1,)"), 2, MIL_ERROR_UNSUPPORTED, "bfloat16" },
        { D("|V2", "False", "(1,)"), 2, MIL_ERROR_UNSUPPORTED, "bfloat16" },
        { D("|V16", "False", "(1,)"), 16, MIL_ERROR_UNSUPPORTED, "structured" },
        { D("<U5", "False", "(1,)"), 20, MIL_ERROR_UNSUPPORTED, "text" },
        { D("|S5", "False", "(1,)"), 5, MIL_ERROR_UNSUPPORTED, "text" },
        { D("<c8", "False", "(1,)"), 8, MIL_ERROR_UNSUPPORTED, "complex" },
        { D("<M8[ns]", "False", "(1,)"), 8, MIL_ERROR_UNSUPPORTED, "dates" },
        { D("<m8[s]", "False", "(1,)"), 8, MIL_ERROR_UNSUPPORTED, "dates" },
        { "{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (1,)}", 4, MIL_ERROR_UNSUPPORTED, "structured" },
        { "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (1,)}", 8, MIL_ERROR_FORMAT, "descr is not a string" },
        { "{'descr': '<f\\x34', 'fortran_order': False, 'shape': (1,)}", 4, MIL_ERROR_FORMAT, "descr is not a string" },
        { "{'descr': '<f4", 4, MIL_ERROR_FORMAT, "descr is not a string" } };
    mil_context *ctx = make_context();
    mil_npy *npy;
    size_t size;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int raw = 0; raw < 2; raw++) {
            unsigned char *bytes = npy_bytes(1, cases[i].dict, cases[i].data, raw, &size);
            const mil_status status = mil_npy_open_memory(ctx, bytes, size, 0, &npy);
            if (!CHECK(status == cases[i].status && npy == NULL)) printf("  %s: %s %s\n", cases[i].dict, mil_status_name(status), mil_error(ctx));
            CHECK_CONTAINS(mil_error(ctx), cases[i].sentence);
            mil_npy_free(npy);
            free(bytes);
        }
    }
    unsigned char *bytes = npy_bytes(1, D("<f4", "False", "(2, 3)"), 24, 0, &size);
    for (size_t n = 0; n < size; n++) {                    // cut anywhere
        unsigned char *cut = (unsigned char *)malloc(n + 1);
        memcpy(cut, bytes, n);
        CHECK(mil_npy_open_memory(ctx, cut, n, 0, &npy) == MIL_ERROR_FORMAT);
        free(cut);
    }
    for (int version = 0; version < 256; version++) {
        bytes[6] = (unsigned char)version;
        if (version >= 1 && version <= 3) continue;
        CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == MIL_ERROR_UNSUPPORTED);
    }
    bytes[6] = 1;
    bytes[7] = 1;
    CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == MIL_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(mil_error(ctx), "version 1.1");
    free(bytes);
    bytes = npy_bytes(1, D("<f4", "False", "(2, 3)"), 24, 2, &size);
    CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == MIL_ERROR_FORMAT);
    CHECK_CONTAINS(mil_error(ctx), "does not end with a newline");
    free(bytes);
    bytes = npy_bytes(1, D("<f4", "False", "(2, 3)"), 25, 0, &size);
    bytes[8]--;                                            // a length that is one off would shift the data by a byte
    CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == MIL_ERROR_FORMAT);
    free(bytes);
    char *many = (char *)malloc(10100);                    // NumPy's limit
    memset(many, ' ', 10100);
    memcpy(many, D("<f4", "False", "()"), strlen(D("<f4", "False", "()")));
    for (int over = 0; over < 2; over++) {
        many[9999 + over] = 0;
        bytes = npy_bytes(2, many, 4, 1, &size);
        CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == (over ? MIL_ERROR_FORMAT : MIL_OK));
        mil_npy_free(npy);
        free(bytes);
        many[9999 + over] = ' ';
    }
    free(many);
    CHECK(mil_npy_open_memory(ctx, "\x93NUMPY\2\0\xff\xff\xff\xff{}", 14, 0, &npy) == MIL_ERROR_FORMAT);
    CHECK(mil_npy_open_memory(ctx, "PK\3\4aaaaaaaaa", 13, 0, &npy) == MIL_ERROR_FORMAT);
    CHECK_CONTAINS(mil_error(ctx), "zip");
    CHECK(mil_npy_open_memory(ctx, NULL, 1, 0, &npy) == MIL_ERROR_ARGUMENT);
    CHECK(mil_npy_open_memory(ctx, "", 0, 0, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_npy_open_memory(NULL, "", 0, 0, &npy) == MIL_ERROR_ARGUMENT);
    end_context(ctx);
}

TEST(npy_byte_orders_and_fortran_order)
{
    mil_context *ctx = make_context();
    mil_npy *npy;
    size_t size;
    const char foreign = MILI_BIG_ENDIAN ? '<' : '>';
    static const char *const types[] = { "f4", "f8", "i2", "u8" };
    static const int widths[] = { 4, 8, 2, 8 };
    for (int i = 0; i < 4; i++) {
        char dict[100];
        snprintf(dict, sizeof dict, "{'descr': '%c%s', 'fortran_order': False, 'shape': (3,), }", foreign, types[i]);
        unsigned char *bytes = npy_bytes(1, dict, (size_t)(3 * widths[i]), 0, &size);
        CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == MIL_OK);
        const unsigned char *p = (const unsigned char *)mil_npy_tensor(npy)->data;
        for (int b = 0; b < 3 * widths[i]; b++) CHECK(p[b] == b / widths[i] * widths[i] + widths[i] - 1 - b % widths[i]);
        mil_npy_free(npy);
        free(bytes);
    }
    unsigned char *bytes = npy_bytes(1, D(">u1", "True", "(2, 3, 4)"), 24, 0, &size);
    CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == MIL_OK);
    const mil_tensor *t = mil_npy_tensor(npy);
    CHECK(t->stride[0] == 1 && t->stride[1] == 2 && t->stride[2] == 6);
    unsigned char out[256];
    size_t n = sizeof out;
    CHECK(mil_npy_write_memory(ctx, t, out, &n) == MIL_OK && n == 128 + 24);       // row-major again
    for (int i = 0; i < 24; i++) CHECK(out[128 + i] == i / 12 + i / 4 % 3 * 2 + i % 4 * 6);
    mil_npy_free(npy);
    free(bytes);
    end_context(ctx);
}

TEST(npy_bytes_after_the_array_give_a_warning)
{
    mil_context *ctx = make_context();
    size_t size;
    unsigned char *bytes = npy_bytes(1, D("<f4", "False", "(2, 3)"), 31, 0, &size);
    mil_npy *npy;
    CHECK(mil_npy_open_memory(ctx, bytes, size, 0, &npy) == MIL_OK);
    CHECK_CONTAINS(mil_npy_warning(npy), "7 bytes after the array F32 [2, 3] are ignored");
    mil_npy_free(npy);
    free(bytes);
    end_context(ctx);
}

TEST(npy_written_is_what_numpy_writes_and_reads_back)
{
    static const char head[] = "\x93NUMPY\1\0\x76\0{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
    static const mil_dtype types[] = { MIL_F32, MIL_F64, MIL_F16, MIL_I8, MIL_U8, MIL_I16, MIL_U16, MIL_I32, MIL_U32, MIL_I64, MIL_U64, MIL_BOOL };
    mil_context *ctx = make_context();
    const int64_t shapes[4][8] = { { 2, 3 }, { 4 }, { 0 }, { 1, 2, 1, 2, 1, 2, 1, 1 } };
    const int ranks[4] = { 2, 1, 0, 8 };
    unsigned char data[64], out[512];
    mil_npy *npy;
    size_t size = sizeof out;
    for (int i = 0; i < 64; i++) data[i] = (unsigned char)(i * 3 + 1);
    mil_tensor t = mil_tensor_make(data, MIL_F32, 2, shapes[0]);
    CHECK(mil_npy_write_memory(ctx, &t, NULL, &size) == MIL_OK && size == 152);
    CHECK(mil_npy_write_memory(ctx, &t, out, &size) == MIL_OK && memcmp(out, head, 10) == 0 && memcmp(out + 10, head + 10, sizeof head - 11) == 0);
    CHECK(out[127] == '\n' && out[126] == ' ');
    for (int i = 0; i < 12; i++) {
        for (int s = 0; s < 4; s++) {
            t = mil_tensor_make(data, types[i], ranks[s], shapes[s]);
            size = sizeof out;
            CHECK(mil_npy_write_memory(ctx, &t, out, &size) == MIL_OK);
            CHECK(mil_npy_open_memory(ctx, out, size, 0, &npy) == MIL_OK);
            const mil_tensor *r = mil_npy_tensor(npy);
            if (!CHECK(r != NULL)) continue;
            CHECK(r->dtype == t.dtype && r->rank == t.rank && memcmp(r->shape, t.shape, sizeof t.shape) == 0);
            CHECK(memcmp(r->data, data, (size_t)mil_tensor_count(r) * mil_dtype_size(r->dtype)) == 0);
            mil_npy_free(npy);
        }
    }
    size = 100;
    CHECK(mil_npy_write_memory(ctx, &t, out, &size) == MIL_ERROR_ARGUMENT && size == 136);
    t.dtype = MIL_BF16;
    CHECK(mil_npy_write_memory(ctx, &t, NULL, &size) == MIL_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(mil_error(ctx), "BF16");
    t.dtype = MIL_DTYPE_COUNT;
    CHECK(mil_npy_write_memory(ctx, &t, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_npy_write_memory(ctx, NULL, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_npy_write_memory(ctx, &t, NULL, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_npy_write_memory(NULL, &t, NULL, &size) == MIL_ERROR_ARGUMENT);
    end_context(ctx);
}

// ==== files ====

TEST(files_that_are_no_files_are_refused_with_a_reason)
{
    mil_context *ctx = make_context();
    mil_file *file;
    mil_tensors *tensors;
    mil_npy *npy;
    char missing[512], pipe_path[512], closed[512], long_path[1200];
    snprintf(missing, sizeof missing, "%s", in_folder("missing"));
    snprintf(pipe_path, sizeof pipe_path, "%s", in_folder("pipe"));
    snprintf(closed, sizeof closed, "%s", in_folder("empty"));
    memset(long_path, 'x', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = 0;
    put_file(closed, "", 0);
    CHECK(mil_file_open(ctx, missing, 0, 0, &file) == MIL_ERROR_IO && file == NULL);
    CHECK_CONTAINS(mil_error(ctx), missing);
    CHECK_CONTAINS(mil_error(ctx), "No such file");
    CHECK(mil_tensors_open(ctx, missing, 0, &tensors) == MIL_ERROR_IO && mil_npy_open(ctx, missing, 0, &npy) == MIL_ERROR_IO);
    CHECK(mil_file_open(ctx, folder, 0, 0, &file) == MIL_ERROR_IO);
    CHECK_CONTAINS(mil_error(ctx), "it is a folder");
    CHECK(mkfifo(pipe_path, 0600) == 0);
    CHECK(mil_tensors_open(ctx, pipe_path, 0, &tensors) == MIL_ERROR_IO);
    CHECK_CONTAINS(mil_error(ctx), "not a regular file");
    CHECK(mil_file_open(ctx, "/dev/null", 0, 0, &file) == MIL_ERROR_IO);
    CHECK(mil_file_open(ctx, long_path, 0, 0, &file) == MIL_ERROR_IO);
    CHECK(mil_file_open(ctx, NULL, 0, 0, &file) == MIL_ERROR_ARGUMENT);
    CHECK(mil_file_open(ctx, missing, 0, 0, NULL) == MIL_ERROR_ARGUMENT && mil_file_open(NULL, missing, 0, 0, &file) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_open(ctx, missing, 0, NULL) == MIL_ERROR_ARGUMENT && mil_npy_open(ctx, missing, 0, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_open(NULL, missing, 0, &tensors) == MIL_ERROR_ARGUMENT && mil_npy_open(NULL, missing, 0, &npy) == MIL_ERROR_ARGUMENT);
    CHECK(mil_file_open(ctx, closed, 0, 0, &file) == MIL_OK && mil_file_size(file) == 0 && mil_file_data(file) == NULL);
    mil_file_free(file);
    mil_file_free(NULL);
    CHECK(mil_tensors_open(ctx, closed, 0, &tensors) == MIL_ERROR_FORMAT && mil_npy_open(ctx, closed, 0, &npy) == MIL_ERROR_FORMAT);
    CHECK_CONTAINS(mil_error(ctx), closed);
    // not written to either
    CHECK(mil_file_write(ctx, pipe_path, "x", 1) == MIL_ERROR_IO);
    CHECK_CONTAINS(mil_error(ctx), "not a regular file");
    CHECK(mil_file_write(ctx, folder, "x", 1) == MIL_ERROR_IO);
    CHECK(mil_file_write(ctx, "/dev/null", "x", 1) == MIL_ERROR_IO);
    CHECK(mil_file_write(ctx, in_folder("no/such/folder"), "x", 1) == MIL_ERROR_IO);
    CHECK(mil_file_write(ctx, "", "x", 1) == MIL_ERROR_ARGUMENT && mil_file_write(ctx, NULL, "x", 1) == MIL_ERROR_ARGUMENT);
    CHECK(mil_file_write(ctx, missing, NULL, 1) == MIL_ERROR_ARGUMENT && mil_file_write(NULL, missing, "x", 1) == MIL_ERROR_ARGUMENT);
    CHECK(empty_folder() == 2);
    end_context(ctx);
}

TEST(files_are_read_mapped_or_not_and_up_to_a_limit)
{
    mil_context *ctx = make_context();
    mil_file *file;
    const char *path = in_folder("bytes");
    put_file(path, "0123456789", 10);
    for (int flags = 0; flags < 2; flags++) {
        fault_short = flags;                               // the system may give a few bytes at a time
        CHECK(mil_file_open(ctx, path, 10, (unsigned)flags, &file) == MIL_OK && mil_file_size(file) == 10);
        CHECK(memcmp(mil_file_data(file), "0123456789", 10) == 0 && file->mapped == !flags);
        mil_file_free(file);
        fault_short = 0;
        CHECK(mil_file_open(ctx, path, 9, (unsigned)flags, &file) == MIL_ERROR_FORMAT && file == NULL);
        CHECK_CONTAINS(mil_error(ctx), "10 bytes, more than the 9");
    }
    fault_kind = CALL_MAP;
    fault_at = fault_calls = 0;                            // a file system that cannot map
    CHECK(mil_file_open(ctx, path, 0, 0, &file) == MIL_OK && !file->mapped && memcmp(mil_file_data(file), "0123456789", 10) == 0);
    fault_at = -1;
    mil_file_free(file);
    CHECK(mil_file_size(NULL) == 0 && mil_file_data(NULL) == NULL);
    CHECK(empty_folder() == 1);
    end_context(ctx);
}

TEST(files_are_written_in_pieces)
{
    mil_context *ctx = make_context();
    const char *path = in_folder("pieces");
    const size_t total = 100000;
    unsigned char *bytes = (unsigned char *)malloc(total);
    mil_writer *w;
    struct stat info;
    for (size_t i = 0; i < total; i++) bytes[i] = (unsigned char)draw();
    for (int round = 0; round < 4; round++) {
        size_t at = 0;
        fault_short = round == 3;
        CHECK(mil_writer_create(ctx, path, &w) == MIL_OK);
        while (at < total) {
            size_t n = (size_t)(draw() % (round == 0 ? 10 : round == 1 ? 20000 : 60000));
            n = MILI_MIN(n, total - at);
            CHECK(mil_writer_put(w, bytes + at, n) == MIL_OK);
            at += n;
        }
        CHECK(mil_writer_commit(w) == MIL_OK);
        CHECK(mil_writer_put(w, "x", 1) == MIL_ERROR_STATE && mil_writer_commit(w) == MIL_ERROR_STATE);
        mil_writer_free(w);
        fault_short = 0;
        CHECK(file_is(path, bytes, total));
        if (round == 1) CHECK(chmod(path, 0600) == 0);
        if (round == 2) CHECK(stat(path, &info) == 0 && (info.st_mode & 0777) == 0600);    // permissions stay
    }
    CHECK(mil_writer_create(ctx, path, &w) == MIL_OK && mil_writer_put(w, "new", 3) == MIL_OK);
    mil_writer_free(w);                                    // without a commit
    CHECK(file_is(path, bytes, total));
    CHECK(mil_file_write(ctx, path, NULL, 0) == MIL_OK && file_is(path, "", 0));
    CHECK(mil_writer_create(ctx, path, NULL) == MIL_ERROR_ARGUMENT && mil_writer_create(NULL, path, &w) == MIL_ERROR_ARGUMENT);
    CHECK(mil_writer_put(NULL, "x", 1) == MIL_ERROR_ARGUMENT && mil_writer_commit(NULL) == MIL_ERROR_ARGUMENT);
    mil_writer_free(NULL);
    // temporary names that a crashed process left behind are passed over, and left alone
    char stale[600];
    snprintf(stale, sizeof stale, "%s.%ld-0.tmp", path, (long)getpid());
    put_file(stale, "stale", 5);
    CHECK(mil_file_write(ctx, path, "abc", 3) == MIL_OK && file_is(path, "abc", 3) && file_is(stale, "stale", 5));
    fault_kind = CALL_OPEN;
    fault_errno = EEXIST;
    fault_at = fault_calls = 0;
    fault_forever = 1;                                     // every name is taken: an end is found
    CHECK(mil_file_write(ctx, path, "xyz", 3) == MIL_ERROR_IO);
    CHECK_CONTAINS(mil_error(ctx), "no name is free");
    fault_at = -1;
    fault_forever = 0;
    CHECK(file_is(path, "abc", 3));
    CHECK(chdir(folder) == 0);                             // a path without a folder
    CHECK(mil_file_write(ctx, "bare", "abc", 3) == MIL_OK && file_is("bare", "abc", 3));
    CHECK(chdir("/") == 0);
    CHECK(empty_folder() == 3);
    free(bytes);
    end_context(ctx);
}

// What others may read stays readable, whatever the umask of the program that writes it anew. A new file does go by the umask.
TEST(a_file_written_over_keeps_its_permissions_under_any_umask)
{
    static const mode_t modes[] = { 0664, 0644, 0600 };
    mil_context *ctx = make_context();
    const char *path = in_folder("shared");
    struct stat info;
    const mode_t old = umask(077);
    CHECK(mil_file_write(ctx, path, "new", 3) == MIL_OK && stat(path, &info) == 0 && (info.st_mode & 0777) == 0600);
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        CHECK(chmod(path, modes[i]) == 0);
        CHECK(mil_file_write(ctx, path, "over", 4) == MIL_OK && file_is(path, "over", 4));
        CHECK(stat(path, &info) == 0 && (info.st_mode & 0777) == modes[i]);
    }
    umask(old);
    CHECK(remove(path) == 0);
    end_context(ctx);
}

// One write of each kind, to the same path; returns its status.
static mil_status write_something(mil_context *ctx, int kind, const char *path)
{
    static float many[20000];
    mil_tensor t[7];
    const char *names[7];
    const mil_meta meta = { "k", "v" };
    const int64_t shape[] = { 20000 };
    int n = make_sample(t, names);
    t[n] = mil_tensor_make(many, MIL_F32, 1, shape);
    names[n++] = "many";
    if (kind == 0) return mil_file_write(ctx, path, "something new", 13);
    if (kind == 1) return mil_tensors_write(ctx, path, t, names, n, &meta, 1);
    t[6].stride[0] = 4;
    return mil_npy_write(ctx, path, &t[6]);
}

// A folder that cannot be opened or synchronised, as some file systems have it, does not make a written file a failure; after a
// failed write all that follows fails with the same reason, and the old file stays.
TEST(files_whose_folder_cannot_be_synchronised_are_written)
{
    static const struct { int kind, number, code, ok; } cases[] = {
        { CALL_OPEN, 1, EACCES, 1 }, { CALL_OPEN, 1, EIO, 0 }, { CALL_SYNC, 1, EINVAL, 1 }, { CALL_SYNC, 1, EIO, 0 } };
    mil_context *ctx = make_context();
    const char *path = in_folder("folder");
    mil_writer *w;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fault_kind = cases[i].kind;
        fault_errno = cases[i].code;
        fault_calls = 0;
        fault_at = cases[i].number;
        const mil_status status = mil_file_write(ctx, path, "abc", 3);
        fault_at = -1;
        CHECK(status == (cases[i].ok ? MIL_OK : MIL_ERROR_IO));
        CHECK(file_is(path, "abc", 3));
    }
    CHECK(mil_writer_create(ctx, path, &w) == MIL_OK && mil_writer_put(w, NULL, 0) == MIL_OK && mil_writer_put(w, NULL, 1) == MIL_ERROR_ARGUMENT);
    static unsigned char large[1 << 17];
    fault_kind = CALL_WRITE;
    fault_errno = ENOSPC;
    fault_calls = 0;
    fault_at = 0;
    CHECK(mil_writer_put(w, large, sizeof large) == MIL_ERROR_IO);
    fault_at = -1;
    CHECK(mil_writer_put(w, "x", 1) == MIL_ERROR_IO);
    CHECK_CONTAINS(mil_error(ctx), "failed before");
    CHECK(mil_writer_commit(w) == MIL_ERROR_IO);
    CHECK_CONTAINS(mil_error(ctx), "failed before");
    mil_writer_free(w);
    CHECK(file_is(path, "abc", 3));
    end_context(ctx);
}

TEST(files_when_the_nth_system_call_fails_the_old_file_stays)
{
    static const int kinds[] = { CALL_OPEN, CALL_WRITE, CALL_SYNC, CALL_CLOSE, CALL_RENAME, CALL_ANY };
    static const int errors[] = { ENOSPC, EIO, 0, EINTR };
    mil_context *ctx = make_context();
    empty_folder();                                        // of what other tests left
    char path[512];
    snprintf(path, sizeof path, "%s", in_folder("target"));
    for (int what = 0; what < 3; what++) {
        for (int e = 0; e < 4; e++) {
            for (int k = 0; k < 6; k++) {
                int done = 0;
                if (e == 2 && kinds[k] != CALL_WRITE) continue;            // "wrote nothing" has no errno
                for (long n = 0; !done && n < 200; n++) {
                    put_file(path, "old", 3);
                    const size_t before = mil_context_bytes(ctx);
                    fault_kind = kinds[k];
                    fault_errno = errors[e];
                    fault_calls = 0;
                    fault_at = n;
                    const mil_status status = write_something(ctx, what, path);
                    done = fault_calls <= fault_at;        // fewer calls than that: nothing failed
                    fault_at = -1;
                    CHECK(mil_context_bytes(ctx) == before);
                    if (done || (errors[e] == EINTR && kinds[k] != CALL_RENAME && kinds[k] != CALL_ANY && kinds[k] != CALL_OPEN)) {
                        if (!CHECK(status == MIL_OK)) printf("  %d %d %d %ld %s\n", what, errors[e], kinds[k], n, mil_error(ctx));
                    } else if (status != MIL_OK) {
                        CHECK(status == MIL_ERROR_IO);
                        CHECK_CONTAINS(mil_error(ctx), path);
                        if (!strstr(mil_error(ctx), "its folder")) CHECK(file_is(path, "old", 3));
                    } else CHECK(errors[e] == EINTR);
                    CHECK(empty_folder() == 1);            // no temporary file
                }
                CHECK(done);
            }
        }
    }
    end_context(ctx);
}

TEST(files_when_the_nth_read_fails_nothing_is_left)
{
    static const int kinds[] = { CALL_OPEN, CALL_STAT, CALL_READ };
    mil_context *ctx = make_context();
    char st_path[512], npy_path[512];
    snprintf(st_path, sizeof st_path, "%s", in_folder("a.safetensors"));
    snprintf(npy_path, sizeof npy_path, "%s", in_folder("a.npy"));
    CHECK(write_something(ctx, 1, st_path) == MIL_OK && write_something(ctx, 2, npy_path) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        for (int e = 0; e < 2; e++) {
            const size_t before = mil_context_bytes(ctx);
            mil_tensors *tensors = NULL;
            mil_npy *npy = NULL;
            fault_errno = e ? EIO : 0;
            if (!e && kinds[k] != CALL_READ) continue;
            fault_kind = kinds[k];
            fault_calls = fault_at = 0;
            CHECK(mil_tensors_open(ctx, st_path, MIL_FILE_READ, &tensors) == MIL_ERROR_IO && !tensors);
            CHECK_CONTAINS(mil_error(ctx), e ? strerror(EIO) : "became shorter");
            fault_calls = 0;
            CHECK(mil_npy_open(ctx, npy_path, MIL_FILE_READ, &npy) == MIL_ERROR_IO && !npy);
            fault_at = -1;
            CHECK(mil_context_bytes(ctx) == before);
        }
    }
    fault_kind = CALL_READ;
    fault_errno = EINTR;
    fault_calls = fault_at = 0;
    mil_npy *npy = NULL;
    CHECK(mil_npy_open(ctx, npy_path, MIL_FILE_READ, &npy) == MIL_OK && fault_calls == 2);
    fault_at = -1;
    mil_npy_free(npy);
    CHECK(empty_folder() == 2);
    end_context(ctx);
}

// Everything that allocates, as one run; the status of the first failure.
static mil_status allocate_everything(mil_context *ctx, const char *st_path, const char *npy_path, const unsigned char *bytes, size_t size)
{
    mil_tensors *tensors = NULL;
    mil_npy *npy = NULL;
    mil_file *file = NULL;
    mil_status status = MIL_OK;
    const mil_meta meta[] = { { "a", "1" }, { "b", "2" } };
    mil_tensor t[6];
    const char *names[6];
    const int n = make_sample(t, names);
    size_t need = 0;
    size_t npy_size = 0;
    unsigned char *foreign = npy_bytes(1, MILI_BIG_ENDIAN ? D("<f4", "False", "(4,)") : D(">f4", "False", "(4,)"), 16, 0, &npy_size);
#define TRY(call) do { if (status == MIL_OK) status = (call); } while (0)
    TRY(mil_tensors_open_memory(ctx, bytes, size, 0, &tensors));
    mil_tensors_free(tensors);
    tensors = NULL;
    TRY(mil_tensors_open(ctx, st_path, 0, &tensors));
    mil_tensors_free(tensors);
    tensors = NULL;
    TRY(mil_tensors_open(ctx, st_path, MIL_FILE_READ, &tensors));
    mil_tensors_free(tensors);
    TRY(mil_npy_open(ctx, npy_path, MIL_FILE_READ, &npy));
    mil_npy_free(npy);
    npy = NULL;
    TRY(mil_npy_open_memory(ctx, foreign, npy_size, 0, &npy));
    mil_npy_free(npy);
    TRY(mil_file_open(ctx, st_path, 0, MIL_FILE_READ, &file));
    mil_file_free(file);
    TRY(mil_tensors_write_memory(ctx, t, names, n, meta, 2, NULL, &need));
    TRY(mil_tensors_write(ctx, st_path, t, names, n, meta, 2));
    TRY(mil_npy_write(ctx, npy_path, &t[1]));
    TRY(mil_file_write(ctx, npy_path, "x", 1));
    free(foreign);
    return status;
}

TEST(files_when_the_nth_allocation_fails_nothing_is_left)
{
    char st_path[512], npy_path[512];
    snprintf(st_path, sizeof st_path, "%s", in_folder("a.safetensors"));
    snprintf(npy_path, sizeof npy_path, "%s", in_folder("a.npy"));
    for (alloc_fail_after = 0; alloc_fail_after < 2; alloc_fail_after++) {
        mil_context *ctx = make_context();
        size_t size;
        unsigned char *bytes = safetensors_n(sample, sizeof sample - 1, SAMPLE_DATA, &size);
        int done = 0;
        long n = 0;
        for (; !done && n < 1000; n++) {
            CHECK(write_something(ctx, 1, st_path) == MIL_OK && write_something(ctx, 2, npy_path) == MIL_OK);
            const size_t before = mil_context_bytes(ctx);
            const long live = alloc_live;
            alloc_calls = 0;
            alloc_fail_at = n;
            const mil_status status = allocate_everything(ctx, st_path, npy_path, bytes, size);
            done = alloc_calls <= n;
            alloc_fail_at = -1;
            CHECK(status == (done ? MIL_OK : MIL_ERROR_NO_MEMORY));
            if (!done) CHECK_CONTAINS(mil_error(ctx), "no memory");
            CHECK(mil_context_bytes(ctx) == before && alloc_live == live);
            CHECK(empty_folder() == 2);
        }
        CHECK(done && n > 20);
        free(bytes);
        end_context(ctx);
    }
    alloc_fail_after = 0;
}

// ---- models: each system call of load, open and save fails in turn ----
TEST(failing_system_calls_leave_the_model_and_its_file_as_they_were)
{
    static const char small[] = "in_dim=6 embed_dim=8 attn_dim=4";
    static const mil_real marker = 7;
    mil_context *ctx = make_context();
    mil_model *model = mil_create(ctx, "abmil", small), *other = mil_create(ctx, "abmil", small);
    char path[512];
    snprintf(path, sizeof path, "%s", in_folder("m.safetensors"));
    if (!CHECK(model && other && mil_model_init(model, 3) == MIL_OK && mil_save(model, path) == MIL_OK)) return;
    mil_real *first = (mil_real *)mil_model_param(other, 0)->data;
    fault_errno = EIO;
    fault_kind = CALL_ANY;
    for (int which = 0; which < 3; which++) {              // load, open, save
        int done = 0;
        for (long n = 0; !done && n < 100; n++) {
            mil_model *opened = NULL;
            mil_status status;
            const size_t before = mil_context_bytes(ctx);
            *first = marker;
            fault_at = n;
            fault_calls = 0;
            if (which == 0) status = mil_load(other, path);
            else if (which == 1) status = (opened = mil_open(ctx, path)) != NULL ? MIL_OK : mil_error_status(ctx);
            else status = mil_save(other, path);
            done = fault_calls <= n;
            fault_at = -1;
            mil_model_free(opened);
            CHECK(mil_context_bytes(ctx) == before);
            CHECK(!done || status == MIL_OK);
            if (status != MIL_OK) {
                CHECK(status == MIL_ERROR_IO && mil_error(ctx)[0]);
                CHECK(*first == marker);
                mil_model *check = mil_open(ctx, path);    // the old file or the new one, whole
                CHECK(check && (which == 2 || *(mil_real *)mil_model_param(check, 0)->data != marker));
                mil_model_free(check);
            }
            CHECK(empty_folder() == 1);                    // nothing half-written stands beside it
            CHECK(mil_save(model, path) == MIL_OK);
        }
        CHECK(done);
    }
    empty_folder();
    mil_model_free(model);
    mil_model_free(other);
    end_context(ctx);
}

TEST(files_written_are_byte_identical_on_disk_and_in_memory)
{
    mil_context *ctx = make_context();
    mil_tensor t[6];
    const char *names[6];
    const int n = make_sample(t, names);
    size_t size;
    unsigned char *bytes = write_sample(ctx, &size, NULL, 0, 1);
    const char *path = in_folder("x.safetensors");
    CHECK(mil_tensors_write(ctx, path, t, names, n, NULL, 0) == MIL_OK && file_is(path, bytes, size));
    for (int flags = 0; flags < 2; flags++) {
        mil_tensors *file;
        CHECK(mil_tensors_open(ctx, path, (unsigned)flags, &file) == MIL_OK && mil_tensors_count(file) == n);
        float w[6];
        memcpy(w, mil_tensors_get(file, "w")->data, sizeof w);
        CHECK(memcmp(w, w_values, sizeof w) == 0);
        mil_tensors_free(file);
    }
    names[0] = "w";
    CHECK(mil_tensors_write(ctx, path, t, names, n, NULL, 0) == MIL_ERROR_ARGUMENT && file_is(path, bytes, size));
    CHECK(mil_tensors_write(NULL, path, t, names, n, NULL, 0) == MIL_ERROR_ARGUMENT);
    CHECK(mil_npy_write(NULL, path, t) == MIL_ERROR_ARGUMENT && mil_npy_write(ctx, NULL, t) == MIL_ERROR_ARGUMENT);
    t[0].dtype = MIL_BF16;
    CHECK(mil_npy_write(ctx, path, t) == MIL_ERROR_ARGUMENT || mil_error_status(ctx) == MIL_ERROR_UNSUPPORTED);
    CHECK(empty_folder() == 1);
    free(bytes);
    end_context(ctx);
}

// ==== files of others, where they are at hand ====

static int ends_with(const char *name, const char *end)
{
    const size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

TEST(sample_files_open)
{
    static const char *const folders[] = { "data/formats", "cases" };
    mil_context *ctx = make_context();
    int count = 0;
    for (int f = 0; f < 2; f++) {
        char base[400], path[800];
        snprintf(base, sizeof base, "%.300s/%s", shared_folder(), folders[f]);
        DIR *d = opendir(base);
        struct dirent *e;
        if (!d) { printf("note: no %s, skipped\n", base); continue; }
        while ((e = readdir(d)) != NULL) {
            snprintf(path, sizeof path, "%s/%.300s", base, e->d_name);
            for (unsigned flags = 0; flags < 2; flags++) {
                if (ends_with(e->d_name, ".safetensors")) {
                    mil_tensors *file;
                    if (!CHECK(mil_tensors_open(ctx, path, flags, &file) == MIL_OK)) printf("  %s\n", mil_error(ctx));
                    mili_json v;
                    const char *config = mil_tensors_meta(file, "config");
                    if (f == 1) {
                        if (CHECK(config != NULL)) CHECK(mili_json_parse(ctx, path, config, strlen(config), 16, &v) == MIL_OK && mili_json_kind(v) == '{');
                        CHECK_STRING(mil_tensors_meta(file, "format"), "mil-case/1");
                    }
                    mil_tensors_free(file);
                    count++;
                } else if (ends_with(e->d_name, ".npy")) {
                    mil_npy *file;
                    if (!CHECK(mil_npy_open(ctx, path, flags, &file) == MIL_OK)) printf("  %s\n", mil_error(ctx));
                    CHECK_STRING(mil_npy_warning(file), "");
                    mil_npy_free(file);
                    count++;
                }
            }
        }
        closedir(d);
    }
    printf("note: %d sample files opened\n", count / 2);
    end_context(ctx);
}

static float element(const mil_tensor *t, int64_t i, int64_t j)
{
    const int64_t size = (int64_t)mil_dtype_size(t->dtype), a = t->stride[0] ? t->stride[0] : size * t->shape[1], b = t->stride[1] ? t->stride[1] : size;
    float x;
    memcpy(&x, (const char *)t->data + i * a + j * b, 4);
    return x;
}

TEST(sample_features_are_the_same_in_every_npy_variant)
{
    static const char *const names[] = { "f4", "big_endian_f4", "fortran_f4", "version2_f4", "version3_f4", "align16_old_numpy_f4", "odd_header_spacing_f4" };
    mil_context *ctx = make_context();
    mil_npy *expected, *npy;
    char path[600];
    const uint16_t probe = 1;                              // with MILI_BIG_ENDIAN forced to test swapping, values are not real ones
    const int forced = *(const unsigned char *)&probe == MILI_BIG_ENDIAN;
    snprintf(path, sizeof path, "%.300s/data/formats/expected_features.npy", shared_folder());
    if (!forced && mil_npy_open(ctx, path, 0, &expected) == MIL_OK) {
        for (int k = 0; k < 7; k++) {
            snprintf(path, sizeof path, "%.300s/data/formats/%s.npy", shared_folder(), names[k]);
            if (!CHECK(mil_npy_open(ctx, path, 0, &npy) == MIL_OK)) { printf("  %s\n", mil_error(ctx)); continue; }
            const mil_tensor *t = mil_npy_tensor(npy), *r = mil_npy_tensor(expected);
            int same = t->rank == 2 && t->shape[0] == r->shape[0] && t->shape[1] == r->shape[1];
            for (int64_t i = 0; same && i < r->shape[0]; i++) for (int64_t j = 0; j < r->shape[1]; j++) same &= element(t, i, j) == element(r, i, j);
            CHECK(same);
            mil_npy_free(npy);
        }
        size_t size = 0, n = 0;                            // and NumPy's own bytes are written
        CHECK(mil_npy_write_memory(ctx, mil_npy_tensor(expected), NULL, &size) == MIL_OK);
        unsigned char *bytes = (unsigned char *)malloc(size), *on_disk;
        CHECK(mil_npy_write_memory(ctx, mil_npy_tensor(expected), bytes, &size) == MIL_OK);
        snprintf(path, sizeof path, "%.300s/data/formats/expected_features.npy", shared_folder());
        on_disk = get_file(path, &n);
        CHECK(on_disk && n == size && memcmp(on_disk, bytes, n) == 0);
        free(bytes);
        free(on_disk);
        mil_npy_free(expected);
    }
    rmdir((empty_folder(), folder));
    end_context(ctx);
}

TESTS(T(failing_system_calls_leave_the_model_and_its_file_as_they_were)
      T(json_accepts_what_the_grammar_allows) T(json_refuses_everything_else) T(json_nested_200000_deep_is_refused_at_its_limit)
      T(json_cut_anywhere_is_refused) T(json_values_are_found_and_read) T(json_names_that_occur_twice_are_named)
      T(json_integers_are_exact_or_refused) T(decimal_numbers_are_rounded_correctly) T(numbers_are_written_short_and_read_back_the_same)
      T(json_strings_are_escaped) T(index_sort_sorts) T(safetensors_valid_oddities_are_read) T(safetensors_broken_rules_are_named)
      T(safetensors_lengths_are_checked) T(safetensors_tensors_and_metadata_are_found) T(safetensors_foreign_dtypes_can_be_listed)
      T(safetensors_thousands_of_tensors_take_memory_in_proportion) T(safetensors_and_npy_survive_random_damage)
      T(safetensors_written_reads_back_the_same) T(safetensors_written_twice_or_in_another_order_is_byte_identical)
      T(safetensors_format_can_be_given_and_nothing_is_a_file_too) T(safetensors_strided_tensors_are_written_packed)
      T(safetensors_writer_checks_its_arguments) T(npy_valid_headers_are_read) T(npy_broken_rules_are_named)
      T(npy_byte_orders_and_fortran_order) T(npy_bytes_after_the_array_give_a_warning) T(npy_written_is_what_numpy_writes_and_reads_back)
      T(files_that_are_no_files_are_refused_with_a_reason) T(files_are_read_mapped_or_not_and_up_to_a_limit) T(files_are_written_in_pieces)
      T(a_file_written_over_keeps_its_permissions_under_any_umask)
      T(files_whose_folder_cannot_be_synchronised_are_written)
      T(files_when_the_nth_system_call_fails_the_old_file_stays) T(files_when_the_nth_read_fails_nothing_is_left)
      T(files_when_the_nth_allocation_fails_nothing_is_left) T(files_written_are_byte_identical_on_disk_and_in_memory)
      T(sample_files_open) T(sample_features_are_the_same_in_every_npy_variant))
