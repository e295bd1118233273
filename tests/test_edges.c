// build: float private
// The edges that other tests pass by: objects that are NULL, codes that don't exist, texts and shapes at their limits, a fixed
// block cut into pieces. With these, readers, options and allocators are reached branch by branch (make coverage).
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define MIL_IMPLEMENTATION
#include "../mil.h"
#include "check.h"

static mil_context *context(void)
{
    mil_context *ctx = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK);
    return ctx;
}

TEST(questions_about_nothing_have_harmless_answers)
{
    size_t size = 0;
    mil_real y[2] = { 0, 0 };
    CHECK_STRING(mil_error(NULL), "no context");
    CHECK(mil_error_status(NULL) == MIL_ERROR_ARGUMENT && mil_context_bytes(NULL) == 0 && mil_context_peak_bytes(NULL) == 0);
    CHECK(mil_context_threads(NULL) == 0 && mil_context_fallbacks(NULL) == 0 && mil_context_precision(NULL) == MIL_PRECISION_FULL);
    CHECK(mil_metric_kappa(NULL, NULL, 2, MIL_KAPPA_UNWEIGHTED, NULL) == MIL_ERROR_ARGUMENT);
    mil_error_clear(NULL);
    CHECK(mil_register(NULL, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(!mil_open(NULL, "x") && !mil_open_memory(NULL, "x", 1) && !mil_create(NULL, "abmil", NULL));

    CHECK(!mil_model_context(NULL) && !mil_model_architecture(NULL) && mil_model_param_count(NULL) == 0 && !mil_model_param(NULL, 0));
    CHECK_STRING(mil_model_name(NULL), "");
    CHECK(mil_model_in_dim(NULL) == 0 && mil_model_num_classes(NULL) == 0 && mil_model_parameter_count(NULL) == 0);
    CHECK(!mil_model_option(NULL, "in_dim") && mil_model_config(NULL, NULL, 0) == 0 && !mil_model_find(NULL, "x"));
    CHECK(!mil_model_metadata(NULL, "x") && !mil_model_class_name(NULL, 0));
    CHECK(mil_model_init(NULL, 1) == MIL_ERROR_ARGUMENT && mil_model_set_metadata(NULL, "a", "b") == MIL_ERROR_ARGUMENT);
    CHECK(mil_model_set_class_names(NULL, NULL, 0) == MIL_ERROR_ARGUMENT && mil_save_memory(NULL, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_load_memory(NULL, "x", 1, NULL) == MIL_ERROR_ARGUMENT && mil_load(NULL, "x") == MIL_ERROR_ARGUMENT && mil_save(NULL, "x") == MIL_ERROR_ARGUMENT);
    CHECK(mil_param_read(NULL, y, 2) == MIL_ERROR_ARGUMENT && mil_param_write(NULL, y, 2) == MIL_ERROR_ARGUMENT);
    mil_param_freeze(NULL, 1);
    mil_model_free(NULL);
    CHECK(mil_model_record(NULL, NULL, NULL, NULL, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(!mil_outputs_find(NULL, "logits") && !mil_tape_context(NULL) && mil_tape_status(NULL) == MIL_ERROR_ARGUMENT && !mil_tape_is_training(NULL));

    CHECK(mil_tensors_count(NULL) == 0 && mil_tensors_meta_count(NULL) == 0 && !mil_tensors_meta_key(NULL, 0) && !mil_tensors_meta_value(NULL, 0));
    CHECK(!mil_tensors_name(NULL, 0) && !mil_tensors_at(NULL, 0) && !mil_tensors_get(NULL, "x") && !mil_tensors_meta(NULL, "x"));
    CHECK_STRING(mil_npy_warning(NULL), "");
    CHECK(!mil_npy_tensor(NULL) && mil_writer_put(NULL, "x", 1) == MIL_ERROR_ARGUMENT);
}

TEST(codes_that_do_not_exist_have_no_name)
{
    CHECK_STRING(mil_status_name((mil_status)12345), "?");
    CHECK_STRING(mil_status_text((mil_status)12345), "?");
    CHECK_STRING(mil_dtype_name((mil_dtype)12345), "?");
    CHECK(mil_status_name(MIL_OK)[0] && mil_status_text(MIL_ERROR_NO_MEMORY)[0]);
    CHECK(mil_dtype_size((mil_dtype)12345) == 0);
    mil_context *ctx = context();
    CHECK(mil_context_threads(ctx) >= 1);
    mil_context_free(ctx);
}

TEST(shapes_that_no_memory_holds_have_no_count)
{
    const int64_t large[] = { INT64_MAX / 32, 2, 1 }, negative[] = { 3, -1 }, nothing[] = { 1000, 0 }, many[10] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    mil_tensor t = mil_tensor_make(NULL, MIL_F32, 2, large);
    CHECK(mil_tensor_count(NULL) == -1 && mili_shape_count(2, negative) == -1 && mili_shape_count(2, nothing) == 0);
    CHECK(mil_tensor_count(&t) == (sizeof(size_t) == 8 ? INT64_MAX / 32 * 2 : -1));
    t.shape[1] = 4;
    CHECK(mil_tensor_count(&t) == -1);
    t.rank = -1;
    CHECK(mil_tensor_count(&t) == -1);
    t = mil_tensor_make(NULL, MIL_F32, 10, many);
    CHECK(mil_tensor_count(&t) == -1);
    t = mil_tensor_make(NULL, (mil_dtype)12345, 1, many);
    CHECK(mil_tensor_count(&t) == -1);
}

// Pieces given back in every order merge into the one piece that the block was.
TEST(a_fixed_block_is_whole_again_after_frees_in_any_order)
{
    enum { ROOM = 64 * 64 };
    static const int orders[6][3] = { { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 } };
    mili_free_piece *memory = (mili_free_piece *)malloc(ROOM);
    for (int o = 0; o < 6 && CHECK(memory != NULL); o++) {
        mili_block_heap heap;
        void *piece[5];
        heap.free = memory;
        memory->size = ROOM;
        memory->next = NULL;
        CHECK(!mili_block_reallocate(&heap, NULL, 0, 0) && !mili_block_reallocate(&heap, NULL, 0, SIZE_MAX) && !mili_block_reallocate(&heap, NULL, 0, ROOM + 1));
        for (int i = 0; i < 5; i++) CHECK((piece[i] = mili_block_reallocate(&heap, NULL, 0, (size_t)(100 + i))) != NULL);
        mili_block_reallocate(&heap, piece[0], 100, 0);    // 0 and 4 stand before and behind the three
        for (int i = 0; i < 3; i++) mili_block_reallocate(&heap, piece[1 + orders[o][i]], (size_t)(101 + orders[o][i]), 0);
        void *again = mili_block_reallocate(&heap, NULL, 0, 4 * 128);          // the four pieces of two units each, as one
        CHECK(again == piece[0]);
        mili_block_reallocate(&heap, piece[4], 104, 0);
        mili_block_reallocate(&heap, again, 4 * 128, 0);
        CHECK((again = mili_block_reallocate(&heap, NULL, 0, ROOM)) == (void *)memory && !heap.free);
        CHECK(!mili_block_reallocate(&heap, NULL, 0, 1));
        mili_block_reallocate(&heap, again, ROOM, 0);
        CHECK(heap.free == memory && memory->size == ROOM && !memory->next);
    }
    free(memory);
}

// A block of memory that the caller did not get is no leave to take the heap.
TEST(a_fixed_block_that_is_null_is_refused)
{
    mil_context *ctx = context();
    mil_context *other = ctx;
    mil_context_options o = mil_context_options_default();
    o.memory_size = 1 << 20;
    CHECK(mil_context_create(&other, &o) == MIL_ERROR_ARGUMENT && !other);
    mil_context_free(ctx);
}

TEST(an_array_too_long_for_memory_is_an_error)
{
    mil_context *ctx = context();
    void *array = NULL;
    int64_t capacity = 0;
    CHECK(!mili_reserve(ctx, &array, &capacity, 16, SIZE_MAX / 2) && mil_error_status(ctx) == MIL_ERROR_NO_MEMORY && !array && capacity == 0);
    CHECK_CONTAINS(mil_error(ctx), "no memory for 16 elements");
    mil_context_free(ctx);
}

TEST(an_arena_without_a_mark_is_emptied)
{
    mil_context *ctx = context();
    mili_arena arena;
    memset(&arena, 0, sizeof arena);
    const mili_arena_mark start = mili_arena_here(&arena);
    void *first = mili_arena_alloc(ctx, &arena, 100);
    const mili_arena_mark later = mili_arena_here(&arena);
    CHECK(first && mili_arena_alloc(ctx, &arena, 100000) && mili_arena_alloc(ctx, &arena, 100000));
    mili_arena_release(&arena, later);
    CHECK(mili_arena_here(&arena).used == later.used);
    mili_arena_release(&arena, start);
    CHECK(mili_arena_alloc(ctx, &arena, 100) == first);
    mili_arena_free(ctx, &arena);
    mil_context_free(ctx);
}

TEST(names_longer_than_64_letters_are_compared_by_their_beginning)
{
    char a[100], b[100];
    memset(a, 'a', sizeof a);
    memset(b, 'a', sizeof b);
    a[99] = b[99] = 0;
    b[80] = 'b';
    CHECK(mili_distance(a, b) == 0 && mili_distance("", b) == 64 && mili_distance(a, "") == 64 && mili_distance("kitten", "sitting") == 3);
}

// A plain reader by the standard's table: the length of one UTF-8 character, 0 for none.
static int utf8_plain(const unsigned char *s, int room)
{
    static const int64_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    const int n = s[0] < 0x80 ? 1 : s[0] < 0xc0 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf8 ? 4 : 0;
    if (n == 0 || n > room) return 0;
    int64_t code = n == 1 ? s[0] : s[0] & (0x7f >> n);
    for (int i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80) return 0;
        code = code << 6 | (s[i] & 0x3f);
    }
    return code < least[n] || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff) ? 0 : n;
}

TEST(utf8_is_told_from_other_bytes)
{
    static const unsigned char next[] = { 0, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xff };
    enum { NEXT = sizeof next };
    char s[5] = { 0 };
    int wrong = 0;
    for (int a = 0; a < 256; a++)
        for (int i = 0; i < NEXT * NEXT * NEXT; i++)
            for (int room = 1; room <= 4; room++) {
                s[0] = (char)a;
                s[1] = (char)next[i % NEXT];
                s[2] = (char)next[i / NEXT % NEXT];
                s[3] = (char)next[i / NEXT / NEXT];
                wrong += mili_utf8_size(s, s + room) != utf8_plain((const unsigned char *)s, room);
            }
    CHECK(wrong == 0 && mili_utf8_size(s, s) == 0);
}

TEST(json_strings_cut_or_misspelt_are_refused)
{
    static const struct { const char *text; size_t size; const char *why; } cases[] = {
        { "\"\\\0\"", 4, "an escape that does not exist" },    { "\"\\x\"", 4, "an escape that does not exist" },
        { "\"\\ud800\"", 8, "a lone surrogate" },               { "\"\\ud800\\u0041\"", 14, "a lone surrogate" },
        { "\"\\ud800\\ue000\"", 14, "a lone surrogate" },       { "\"\\ud800\\n\\n\\n\"", 14, "a lone surrogate" },
        { "\"\\ud800abcdef\"", 14, "a lone surrogate" },        { "\"\\udc00\"", 8, "a lone surrogate" },
        { "\"\\", 2, "a string that does not end" },            { "\"\\u00", 5, "\\u without four hex digits" },
        { "\"\x1f\"", 3, "a control character in a string" },   { "\"\xff\"", 3, "invalid UTF-8" } };
    mil_context *ctx = context();
    mili_json v;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        mil_error_clear(ctx);
        CHECK(mili_json_parse(ctx, "text", cases[i].text, cases[i].size, 3, &v) == MIL_ERROR_FORMAT);
        CHECK_CONTAINS(mil_error(ctx), cases[i].why);
    }
    mil_error_clear(ctx);
    CHECK(mili_json_parse(ctx, "text", "\"\\ud83d\\ude00\"", 14, 3, &v) == MIL_OK && mili_json_equal(v, "\xf0\x9f\x98\x80"));
    mil_context_free(ctx);
}

TEST(json_texts_are_compared_character_by_character)
{
    static const char *const texts[] = { "\"\"", "\"a\"", "\"a\\u00e9\"", "\"a\xc3\xaa\"", "\"b\"", "\"\\ud83d\\ude00\"" };   // in order
    char copy[8];
    int nul = 1;
    for (int i = 0; i < 6; i++)
        for (int k = 0; k < 6; k++) {
            mili_json a, b;
            a.text = texts[i], a.size = strlen(texts[i]), b.text = texts[k], b.size = strlen(texts[k]);
            CHECK(mili_json_compare(a, b) == (i > k) - (i < k));
        }
    mili_json v;
    v.text = "\"a\\u0000b\"";
    v.size = 10;
    CHECK(mili_json_copy(v, copy, sizeof copy, &nul) == 3 && nul == 1 && memcmp(copy, "a\0b", 4) == 0);
    CHECK(mili_json_copy(v, copy, 0, NULL) == 3 && mili_json_copy(v, NULL, 8, NULL) == 3 && mili_json_copy(v, copy, 3, NULL) == 3 && copy[0] == 0);
    v.text = "12";
    v.size = 2;
    CHECK(mili_json_copy(v, copy, sizeof copy, NULL) == 0);
    char out[8];
    CHECK(mili_json_escape(0, out) == 6 && memcmp(out, "\\u0000", 6) == 0 && mili_json_escape('\x7f', out) == 1 && mili_json_escape('\n', out) == 2);
    char number[32];
    mili_json_number(number, (double)NAN);                         // never written: the writer's callers check; it ends all the same
    CHECK(strlen(number) < 32);
}

TEST(numbers_end_where_their_text_ends)
{
    double x = 0;
    int64_t n = 0;
    const char *minus = "-", *empty = "";
    CHECK(mili_parse_double("-0", 2, &x) && x == 0 && signbit(x) && mili_parse_double("", 0, &x) && x == 0);   // what is no number was refused before
    CHECK(mili_json_check_number(&minus, minus) != NULL && mili_json_check_number(&empty, empty) != NULL);
    CHECK(!mili_text_int("", &n) && !mili_text_int("7x", &n) && !mili_text_int("x", &n) && !mili_text_int("1.5", &n) && mili_text_int("-7", &n) && n == -7);
    CHECK(!mili_text_int("99999999999999999999", &n));
}

TEST(reasons_of_the_system_are_sentences)
{
    char text[128];
    errno = 0;
    CHECK(mili_os_error() == MILI_OS_UNKNOWN);             // a call may fail and give none
    errno = ENOENT;
    CHECK(mili_os_error() == ENOENT);
    const long codes[] = { MILI_OS_FOLDER, MILI_OS_NOT_FILE, MILI_OS_SHRANK, MILI_OS_EXISTS, MILI_OS_TOO_LARGE, MILI_OS_BAD_PATH, MILI_OS_SHORT_WRITE, MILI_OS_UNKNOWN };
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) CHECK(strlen(mili_os_text(codes[i], text, sizeof text)) > 10);
    CHECK(mili_os_text(2, text, sizeof text)[0] != 0);
}

TEST(files_of_other_kinds_are_recognised)
{
    static const struct { const char *bytes; size_t size; const char *hint; } cases[] = {
        { "PK\3\4", 4, "zip" },            { "PK\3", 3, "" },                    { "PKzz", 4, "" },
        { "\x93NUMPY", 6, "NPY" },         { "\x93NUMPX", 6, "" },               { "\x89HDF\r\n\x1a\n", 8, "HDF5" },
        { "\x89HDF\r\n\x1a ", 8, "" },     { "\x80\2", 2, "pickle" },            { "\x80\5", 2, "pickle" },
        { "\x80\6", 2, "" },               { "\x80\1", 2, "" },                  { "\x80", 1, "" },
        { "\1\0\0\0\0\0\0\0{", 9, "safetensors" },                               { "\1\0\0\0\0\0\0\0[", 9, "" },
        { "", 0, "" } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *hint = mili_file_hint((const unsigned char *)cases[i].bytes, cases[i].size);
        if (cases[i].hint[0]) CHECK_CONTAINS(hint, cases[i].hint);
        else CHECK_STRING(hint, "");
    }
}

TEST(safetensors_questions_outside_the_file_find_nothing)
{
    static const char header[] = "{\"__metadata__\":{\"a\":\"1\"},\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}";
    unsigned char bytes[8 + sizeof header] = { sizeof header - 1 };
    mil_context *ctx = context();
    mil_tensors *file = NULL;
    memcpy(bytes + 8, header, sizeof header - 1);
    if (CHECK(mil_tensors_open_memory(ctx, bytes, sizeof bytes, 0, &file) == MIL_OK)) {
        CHECK(mil_tensors_meta_count(file) == 1);
        CHECK_STRING(mil_tensors_meta_key(file, 0), "a");
        CHECK(!mil_tensors_meta_key(file, -1) && !mil_tensors_meta_key(file, 1) && !mil_tensors_meta_value(file, -1) && !mil_tensors_meta_value(file, 1));
    }
    mil_tensors_free(file);
    mil_context_free(ctx);
}

TEST(safetensors_plans_that_cannot_be_written_are_refused)
{
    mil_context *ctx = context();
    const mil_meta meta = { "a", "b" };
    const char *name = "x";
    const uint8_t value = 1;
    const int64_t one = 1;
    const mil_tensor t = mil_tensor_make(&value, MIL_U8, 1, &one);
    size_t size = 0;
    CHECK(mil_tensors_write_memory(ctx, &t, &name, -1, NULL, 0, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_write_memory(ctx, NULL, &name, 1, NULL, 0, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_write_memory(ctx, &t, NULL, 1, NULL, 0, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_write_memory(ctx, &t, &name, 1, &meta, -1, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_write_memory(ctx, &t, &name, 1, NULL, 1, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_write_memory(ctx, &t, &name, (int64_t)INT32_MAX + 1, NULL, 0, NULL, &size) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tensors_write_memory(ctx, &t, &name, 1, &meta, (int64_t)INT32_MAX + 1, NULL, &size) == MIL_ERROR_ARGUMENT);
    // A header above the format's 100 MB. It is measured alone, so nothing of that size is allocated by the library.
    const size_t room = 100000001;
    char *text = (char *)malloc(room + 1);
    if (text) {
        mil_meta longest = { "a", NULL };
        memset(text, 'b', room);
        text[room] = 0;
        longest.value = text;
        CHECK(mil_tensors_write_memory(ctx, &t, &name, 1, &longest, 1, NULL, &size) == MIL_ERROR_ARGUMENT);
        CHECK_CONTAINS(mil_error(ctx), "above the format's 100000000");
        free(text);
    }
    mil_context_free(ctx);
}

// Empty tensors share their place with each other and with the one behind them, whatever the order in the header.
TEST(safetensors_empty_tensors_may_stand_anywhere)
{
    static const char *const headers[] = {
        "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
        "\"c\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\"d\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[1,1]}}",
        "{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"d\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[1,1]},"
        "\"c\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}" };
    mil_context *ctx = context();
    for (int i = 0; i < 2; i++) {
        unsigned char bytes[512] = { 0 };
        mil_tensors *file = NULL;
        const size_t size = strlen(headers[i]);
        bytes[0] = (unsigned char)(size % 256);
        bytes[1] = (unsigned char)(size / 256);
        memcpy(bytes + 8, headers[i], size);
        bytes[8 + size] = 7;
        if (CHECK(mil_tensors_open_memory(ctx, bytes, 8 + size + 1, 0, &file) == MIL_OK)) {
            CHECK(mil_tensors_count(file) == 4 && *(const uint8_t *)mil_tensors_get(file, "b")->data == 7);
            CHECK(mil_tensor_count(mil_tensors_get(file, "a")) == 0 && mil_tensor_count(mil_tensors_get(file, "d")) == 0);
        } else printf("  %s\n", mil_error(ctx));
        mil_tensors_free(file);
    }
    // Elements can be counted, their bits cannot.
    static const char wide[] = "{\"a\":{\"dtype\":\"F64\",\"shape\":[536870912,536870912],\"data_offsets\":[0,1]}}";
    unsigned char bytes[8 + sizeof wide] = { sizeof wide - 1 };
    mil_tensors *file = NULL;
    memcpy(bytes + 8, wide, sizeof wide - 1);
    CHECK(mil_tensors_open_memory(ctx, bytes, sizeof bytes, 0, &file) == MIL_ERROR_FORMAT && !file);
    CHECK_CONTAINS(mil_error(ctx), "overflows");
    mil_context_free(ctx);
}

// Every 16-bit number, by the kernels of each tier that this machine has, at every length and place.
TEST(halves_are_converted_alike_on_every_tier)
{
    static const mil_cpu tiers[] = { MIL_CPU_PLAIN, MIL_CPU_AVX2, MIL_CPU_AVX512, MIL_CPU_NEON };
    enum { COUNT = 65536 };
    unsigned char *src = (unsigned char *)malloc(2 * COUNT + 1);
    mil_real *y = (mil_real *)malloc(COUNT * sizeof *y);
    int wrong = 0;
    if (!CHECK(src && y)) return;
    for (int i = 0; i < COUNT; i++) {
        const uint16_t h = (uint16_t)i;
        memcpy(src + 1 + 2 * i, &h, 2);                    // unaligned
    }
    for (size_t t = 0; t < sizeof tiers / sizeof *tiers; t++) {
        const mili_kernels *K = mili_kernels_choose(tiers[t]);
        if (!K) continue;
        for (int brain = 0; brain < 2; brain++) {
            (brain ? K->from_bf16 : K->from_f16)(y, src + 1, COUNT);
            for (int i = 0; i < COUNT; i++) {
                const int fraction = brain ? 7 : 10, exponent = i >> fraction & (brain ? 255 : 31), top = brain ? 255 : 31;
                const double f = i & ((1 << fraction) - 1), sign = i >> 15 ? -1 : 1;
                // what the format says: subnormal numbers, then a hidden 1; the largest exponent is infinity or NaN
                const double x = exponent == 0 ? ldexp(f, 1 - top / 2 - fraction) : ldexp(f + (1 << fraction), exponent - top / 2 - fraction);
                wrong += exponent == top ? f != 0 ? y[i] == y[i] : (double)y[i] != sign * HUGE_VAL : (double)y[i] != sign * x;
            }
            for (int n = 0; n < 40; n++) {                 // a tail gives what the whole gave, and nothing behind it is written
                mil_real part[41];
                for (int i = 0; i <= 40; i++) part[i] = 77;
                (brain ? K->from_bf16 : K->from_f16)(part, src + 1 + 2 * 15000, n);
                wrong += part[n] != 77;
                for (int i = 0; i < n; i++) wrong += part[i] != y[15000 + i];
            }
        }
    }
    CHECK(wrong == 0);
    free(src);
    free(y);
}

TEST(bytes_are_swapped_whatever_their_number)
{
    static const unsigned char src[9] = "abcdefgh";
    unsigned char dst[9] = { 0 };
    mili_swap_copy(dst, src, 4, 1);
    CHECK(memcmp(dst, "abcd", 4) == 0);
    mili_swap_copy(dst, src, 8, 2);
    CHECK(memcmp(dst, "badcfehg", 8) == 0);
    mili_swap_copy(dst, src, 8, 4);
    CHECK(memcmp(dst, "dcbahgfe", 8) == 0);
    mili_swap_copy(dst, src, 8, 8);
    CHECK(memcmp(dst, "hgfedcba", 8) == 0);
    mili_sink sink;
    memset(&sink, 0, sizeof sink);
    mili_sink_put(&sink, src, 0);
    mili_sink_put(&sink, src, 8);
    CHECK(sink.size == 8);
    sink.status = MIL_ERROR_IO;
    mili_sink_put(&sink, src, 8);                          // after a failure nothing more is written
    CHECK(sink.size == 8);
}

// An NPY file with this version and dictionary in front of `data` bytes of zeros.
static mil_status npy(mil_context *ctx, int major, const char *dict, size_t data, mil_npy **out)
{
    static unsigned char bytes[512];
    const size_t length = strlen(dict), front = major == 1 ? 10 : 12;
    memset(bytes, 0, sizeof bytes);
    memcpy(bytes, "\x93NUMPY", 6);
    bytes[6] = (unsigned char)major;
    bytes[8] = (unsigned char)length;
    memcpy(bytes + front, dict, length);
    return mil_npy_open_memory(ctx, bytes, front + length + data, 0, out);
}

TEST(npy_oddities)
{
    mil_context *ctx = context();
    mil_npy *file = NULL;
    CHECK(npy(ctx, 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2L,)}\n", 8, &file) == MIL_OK && mil_tensor_count(mil_npy_tensor(file)) == 2);
    mil_npy_free(file);
    CHECK(npy(ctx, 1, "{'descr': '<V2', 'fortran_order': False, 'shape': (2,)}\n", 4, &file) == MIL_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(mil_error(ctx), "bfloat16");
    CHECK(npy(ctx, 1, "{'descr': '|V16', 'fortran_order': False, 'shape': (2,)}\n", 32, &file) == MIL_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(mil_error(ctx), "structured");
    CHECK(npy(ctx, 1, "{'descr': '|V4', 'fortran_order': False, 'shape': (2,)}\n", 8, &file) == MIL_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(mil_error(ctx), "structured");
    CHECK(npy(ctx, 1, "{'descr': '|u1', 'fortran_order': False, 'shape': (1,1,1,1)}\n", 3, &file) == MIL_OK);
    CHECK_CONTAINS(mil_npy_warning(file), "2 bytes after the array");
    mil_npy_free(file);
    CHECK(npy(ctx, 1, "{'descr': '|u1', 'fortran_order': False, 'shape': (2L", 3, &file) == MIL_ERROR_FORMAT);
    CHECK(npy(ctx, 1, "{'descr': '|u1', 'fortran_order': False, 'shape': (2", 3, &file) == MIL_ERROR_FORMAT);
    CHECK(mil_npy_open_memory(ctx, "\x93NUMPY\2\0\0\0", 10, 0, &file) == MIL_ERROR_FORMAT && !file);
    CHECK_CONTAINS(mil_error(ctx), "too short");
    CHECK(mil_npy_open_memory(ctx, NULL, 1, 0, &file) == MIL_ERROR_ARGUMENT && mil_npy_open_memory(ctx, "x", 1, 0, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_npy_open_memory(ctx, NULL, 0, 0, &file) == MIL_ERROR_FORMAT);
    mil_context_free(ctx);
}

// ---- options of every type ----
typedef struct {
    int64_t in_dim, whole;
    double real, loose;
    int yes, choice;
    char text[MIL_OPTION_TEXT_SIZE];
    mil_int_list ints, free_ints;
    mil_text_list texts;
} config;

static const mil_option table[] = {
    { "in_dim",    MIL_OPTION_INT,    offsetof(config, in_dim),    "4",       "1..1000",     "width of an instance" },
    { "whole",     MIL_OPTION_INT,    offsetof(config, whole),     "-3",      NULL,          "any" },
    { "real",      MIL_OPTION_REAL,   offsetof(config, real),      "0.5",     "0..1",        "a rate" },
    { "loose",     MIL_OPTION_REAL,   offsetof(config, loose),     "1e300",   "..",          "without bounds" },
    { "yes",       MIL_OPTION_BOOL,   offsetof(config, yes),       "true",    NULL,          "a switch" },
    { "choice",    MIL_OPTION_CHOICE, offsetof(config, choice),    "relu",    "relu|gelu",   "one of two" },
    { "text",      MIL_OPTION_TEXT,   offsetof(config, text),      "",        NULL,          "a word" },
    { "ints",      MIL_OPTION_INTS,   offsetof(config, ints),      "[3,4]",   "1..9",        "digits" },
    { "free_ints", MIL_OPTION_INTS,   offsetof(config, free_ints), "null",    "no range",    "whole numbers" },
    { "texts",     MIL_OPTION_TEXTS,  offsetof(config, texts),     "[a]",     NULL,          "words" } };
enum { TABLE = sizeof table / sizeof *table };

TEST(options_of_every_type_are_set_or_refused)
{
    static const struct { const char *options, *sentence; } cases[] = {
        { "", NULL }, { " ,\t\n", NULL }, { "\t\n{}", NULL },
        { "whole=7 real=0 loose=-1e308 yes=False choice=gelu text=x ints=null free_ints=[-5] texts=['a b',\"c\"]", NULL },
        { "yes=1,yes=0\tyes=True\nyes=false", NULL }, { "ints=[ 1 , 2 ]", NULL }, { "ints=[]", NULL }, { "ints=None", NULL }, { "texts=[]", NULL },
        { "{\"whole\":7,\"text\":\"x\",\"texts\":[\"a\"],\"ints\":null,\"yes\":true,\"real\":1}", NULL },
        { "whole=1.5", "expected a whole number" },         { "in_dim=0", "(1..1000)" },         { "in_dim=1001", "(1..1000)" },
        { "real=x", "expected a number" },                  { "real=-1", "(0..1)" },             { "real=2", "(0..1)" },
        { "yes=maybe", "expected true or false" },          { "choice=tanh", "relu|gelu" },      { "choice=gel", "relu|gelu" },
        { "text=a\"b", "plain ASCII" },                     { "text=a\\b", "plain ASCII" },      { "text=\x7f", "plain ASCII" },
        { "text=\xc3\xa9", "plain ASCII" },                 { "text=12345678901234567890123456789012", "plain ASCII" },
        { "ints=3", "a list of whole numbers" },            { "ints=[0]", "whole numbers" },     { "ints=[x]", "whole numbers" },
        { "ints=[1", "whole numbers" },                     { "ints=[1;2]", "whole numbers" },   { "ints=[1,2]x", "whole numbers" },
        { "ints=[,]", "whole numbers" },                    { "ints=[1 2]", "whole numbers" },   { "ints=[1,]", "whole numbers" },
        { "texts=[\"a]", "a list of words" },               { "texts=[\"a\\\\\"]", "a list of words" },
        { "texts=[12345678901234567890123456789012]", "a list of words" },
        { "texts=[1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9]", "a list of words" },
        { "colour=red", "no option \"colour\"" },           { "whole", "not key=value" },        { "=3", "not key=value" },
        { "whole =3", "no blanks around the =" },           { "whole, =3", "not key=value" },
        { "a234567890123456789012345678901234567890123456789012345678901234=1", "not key=value" },
        { "[1]", "not key=value" },                         { "{\"whole\":1,\"whole\":2}", "twice" }, { "{\"whole\":1", "JSON" },
        { "{\"a234567890123456789012345678901234567890123456789012345678901234\":1}", "no option" },
        { "{\"a\\u0000b\":1}", "no option" },               { "{\"text\":\"a\\u0000b\"}", "too long" },
        { "{\"colour\":1}", "no option \"colour\"" },       { "{\"whole\":{}}", "whole number" } };
    mil_context *ctx = context();
    config c;
    memset(&c, 0, sizeof c);
    CHECK(mili_option_defaults(ctx, table, TABLE, &c, "defaults") == MIL_OK);
    CHECK(c.whole == -3 && c.real == 0.5 && c.yes == 1 && c.choice == 0 && c.ints.count == 2 && c.ints.value[1] == 4 && c.texts.count == 1);
    CHECK(mili_parse_options(ctx, table, TABLE, NULL, &c, "none") == MIL_OK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        mil_error_clear(ctx);
        const mil_status status = mili_parse_options(ctx, table, TABLE, cases[i].options, &c, "options");
        if (!CHECK((status == MIL_OK) == !cases[i].sentence)) printf("  %s: %s\n", cases[i].options, mil_error(ctx));
        if (cases[i].sentence) CHECK_CONTAINS(mil_error(ctx), cases[i].sentence);
    }
    char text[1200];
    memset(text, '1', sizeof text);
    memcpy(text, "text=", 5);
    text[sizeof text - 1] = 0;
    mil_error_clear(ctx);
    CHECK(mili_parse_options(ctx, table, TABLE, text, &c, "long") == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "too long");
    memcpy(text, "{\"text\":\"", 9);
    memcpy(text + sizeof text - 3, "\"}", 3);
    CHECK(mili_parse_options(ctx, table, TABLE, text, &c, "long") == MIL_ERROR_ARGUMENT);
    memset(text, '1', sizeof text);
    memcpy(text, "{\"whole\":", 9);
    memcpy(text + sizeof text - 2, "}", 2);
    CHECK(mili_parse_options(ctx, table, TABLE, text, &c, "long") == MIL_ERROR_ARGUMENT);
    mili_json list;
    mil_error_clear(ctx);
    CHECK(mili_json_parse(ctx, "list", "[1]", 3, 3, &list) == MIL_OK && mili_parse_options_json(ctx, table, TABLE, list, &c, "list", NULL) == MIL_ERROR_FORMAT);
    mil_error_clear(ctx);
    CHECK(mili_parse_options(ctx, table, 0, "a=1", &c, "empty table") == MIL_ERROR_UNKNOWN);
    // Names to be passed over stand between blanks: a part of one is no name.
    static const char *const ignored[] = { "{\"skip\":1}", "{\"other\":1}", "{\"her\":1}", "{\"ski\":1}", "{\"\":1}", "{\"last\":1}" };
    for (int i = 0; i < 6; i++) {
        const int ok = i == 0 || i == 1 || i == 5;
        CHECK(mili_json_parse(ctx, "object", ignored[i], strlen(ignored[i]), 3, &list) == MIL_OK);
        mil_error_clear(ctx);
        CHECK((mili_parse_options_json(ctx, table, TABLE, list, &c, "object", "skip other last") == MIL_OK) == ok);
    }
    mil_context_free(ctx);
}

// What is printed is read again, and a text that does not fit has its length said, as with snprintf.
TEST(options_are_printed_at_any_room)
{
    mil_context *ctx = context();
    config c, again;
    memset(&c, 0, sizeof c);
    CHECK(mili_option_defaults(ctx, table, TABLE, &c, "defaults") == MIL_OK);
    CHECK(mili_parse_options(ctx, table, TABLE, "text=word texts=[a,bc] ints=[1,2,3]", &c, "options") == MIL_OK);
    for (int json = 0; json < 2; json++)
        for (int i = 0; i < TABLE; i++) {
            char whole[512], part[512];
            const size_t size = mili_option_print(&table[i], &c, whole, sizeof whole, json);
            CHECK(size == strlen(whole));
            for (size_t room = 0; room <= size + 1; room++) {
                memset(part, '#', sizeof part);
                CHECK(mili_option_print(&table[i], &c, room ? part : NULL, room, json) == size && part[room] == '#');
                if (room) CHECK(strlen(part) == (room <= size ? room - 1 : size) && strncmp(part, whole, strlen(part)) == 0);
            }
            const char *expected = "";
            memset(&again, 0, sizeof again);
            if (!json) CHECK(mili_option_set(&table[i], &again, whole, &expected) && memcmp((char *)&again + table[i].offset, (char *)&c + table[i].offset, sizeof(int)) == 0);
        }
    char empty[8];
    CHECK(mili_parse_options(ctx, table, TABLE, "texts=null ints=null", &c, "options") == MIL_OK);
    CHECK(mili_option_print(&table[TABLE - 1], &c, empty, sizeof empty, 0) == 4 && strcmp(empty, "null") == 0);
    CHECK(mili_in_range("0000000000000000000000000000000000..1", 7));         // a bound longer than a number is none
    mil_option wrong = table[0];
    const char *expected = "";
    char text[8];
    wrong.type = (mil_option_type)99;                      // a table of one's own may hold anything
    CHECK(!mili_option_set(&wrong, &c, "1", &expected) && mili_option_print(&wrong, &c, text, sizeof text, 0) == 0);
    wrong.type = MIL_OPTION_CHOICE;                        // a value that is none of the choices
    wrong.choices = "a|b";
    wrong.offset = offsetof(config, choice);
    c.choice = 7;
    CHECK(mili_option_print(&wrong, &c, text, sizeof text, 0) == 0 && mili_option_print(&wrong, &c, text, sizeof text, 1) == 2);
    mil_context_free(ctx);
}

// ---- a model of one's own that does everything wrong, one thing at a time ----
typedef struct { int64_t in_dim, fault; } bad_config;
typedef struct { mil_param *w; } bad_layers;
static const mil_option bad_options[] = { { "in_dim", MIL_OPTION_INT, offsetof(bad_config, in_dim), "2", "1..100000", "width" },
                                          { "fault", MIL_OPTION_INT, offsetof(bad_config, fault), "0", NULL, "what goes wrong" } };
static const mil_config bad_configs[] = { { "base", "" } };
static const mil_init bad_init = { MIL_INIT_CONSTANT, 0 };
enum { BAD_NONE, BAD_DEEP, BAD_SCOPE, BAD_KEY, BAD_RANK, BAD_SHAPE, BAD_TWICE, BAD_ALIAS, BAD_OUTPUTS, BAD_COUNT };

static void bad_declare(mil_builder *b, void *layers, const void *options)
{
    const bad_config *c = (const bad_config *)options;
    const int64_t shape[] = { c->in_dim, 2 }, zero[] = { 0, 2 };
    char key[400];
    memset(key, 'k', sizeof key);
    key[sizeof key - 1] = 0;
    if (c->fault == BAD_DEEP) for (int i = 0; i < 70; i++) mil_declare_push(b, "a");
    if (c->fault == BAD_SCOPE) mil_declare_push(b, "%s", key);
    if (c->fault == BAD_KEY) mil_declare(b, bad_init, 2, shape, "%s", key);
    if (c->fault == BAD_RANK) mil_declare(b, bad_init, 9, shape, "w");
    if (c->fault == BAD_SHAPE) mil_declare(b, bad_init, 2, zero, "w");
    if (c->fault == BAD_TWICE) { mil_declare_fail(b, MIL_ERROR_UNSUPPORTED, "first"); mil_declare_fail(b, MIL_ERROR_ARGUMENT, "second"); }
    if (c->fault == BAD_ALIAS) mil_declare_alias(b, NULL, "other");            // of nothing: nothing happens
    for (int i = 0; i < (c->fault == BAD_DEEP ? 70 : 2); i++) mil_declare_pop(b);     // more than were pushed
    ((bad_layers *)layers)->w = mil_declare(b, bad_init, 2, shape, "weight");
}

static void bad_forward(const void *layers, const void *options, const mil_inputs *in, mil_outputs *out)
{
    out->logits = mil_squeeze(mil_mean(mil_matmul(in->features, mil_use(in->tape, ((const bad_layers *)layers)->w)), 1), 1);
    mil_node *extra = mil_inputs_find(in, "more");
    CHECK(!mil_inputs_find(in, "less"));
    mil_output(out, "nothing", NULL);
    if (extra) mil_output(out, "more", extra);
    if (((const bad_config *)options)->fault == BAD_OUTPUTS) for (int i = 0; i <= MIL_MAX_OUTPUTS; i++) mil_output(out, "many", out->logits);
}

static mil_architecture bad_architecture(void)
{
    mil_architecture a;
    memset(&a, 0, sizeof a);
    a.name = "bad";
    a.options = bad_options;
    a.option_count = 2;
    a.configs = bad_configs;
    a.config_count = 1;
    a.config_size = sizeof(bad_config);
    a.model_size = sizeof(bad_layers);
    a.declare = bad_declare;
    a.forward = bad_forward;
    a.head = "weight  tail";
    a.flags = MIL_MODEL_MASK;
    return a;
}

TEST(models_of_ones_own_are_refused_by_name)
{
    mil_context *ctx = context();
    const mil_architecture good = bad_architecture();
    mil_option not_int = bad_options[0];
    not_int.type = MIL_OPTION_REAL;
    for (int i = 0; i < 6; i++) {
        mil_architecture a = good;
        if (i == 0) a.name = NULL;
        if (i == 1) a.declare = NULL;
        if (i == 2) a.forward = NULL;
        if (i == 3) a.config_count = 0;
        if (i == 4) a.option_count = 0;
        if (i == 5) { a.options = &not_int; a.option_count = 1; }
        CHECK(mil_register(ctx, &a) == MIL_ERROR_ARGUMENT && mil_error(ctx)[0]);
    }
    CHECK(mil_register(ctx, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_register(ctx, &good) == MIL_OK && mil_register(ctx, &good) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "already");
    CHECK(mili_is_head(&good, "weight") && mili_is_head(&good, "tail.bias") && !mili_is_head(&good, "weights") && !mili_is_head(&good, "x"));
    static const char *const sentence[BAD_COUNT] = { NULL, "too long or too deep", "too long or too deep", "is too long", "would have 9 axes", "would have the shape",
                                                     "first", NULL, NULL };
    for (int fault = 0; fault < BAD_COUNT; fault++) {
        char options[32];
        snprintf(options, sizeof options, "in_dim=2 fault=%d", fault);
        mil_model *model = mil_create(ctx, "bad", options);
        if (!CHECK((model != NULL) == !sentence[fault])) printf("  fault %d: %s\n", fault, mil_error(ctx));
        if (sentence[fault]) CHECK_CONTAINS(mil_error(ctx), sentence[fault]);
        mil_model_free(model);
    }
    mil_context_free(ctx);
}

TEST(bags_with_more_in_them)
{
    mil_context *ctx = context();
    const mil_architecture good = bad_architecture();
    const float x[6] = { 1, 2, 3, 4, 5, 6 };
    const int64_t shape[3] = { 1, 3, 1 }, wrong[2] = { 2, 2 };
    mil_named_tensor extra[2];
    memset(extra, 0, sizeof extra);
    extra[1].name = "more";
    extra[1].tensor = mil_tensor_make(x, MIL_F32, 3, shape);
    CHECK(mil_register(ctx, &good) == MIL_OK);
    for (int many = 0; many < 2; many++) {
        mil_model *model = mil_create(ctx, "bad", many ? "in_dim=2 fault=8" : "in_dim=2");
        mil_tape *tape = NULL;
        mil_outputs out;
        mil_bag bag = mil_bag_make(x, 3, 2);
        if (!CHECK(model && mil_tape_create(ctx, &tape) == MIL_OK)) return;
        bag.extra = extra;
        bag.extra_count = 2;
        const mil_status status = mil_model_record(tape, model, &bag, NULL, &out);
        CHECK(status == (many ? MIL_ERROR_UNSUPPORTED : MIL_OK));
        if (many) CHECK_CONTAINS(mil_error(ctx), "at most 32 outputs");
        else CHECK(mil_outputs_find(&out, "more") && !mil_outputs_find(&out, "attention_scores") && !mil_outputs_find(&out, NULL));
        mil_tape_reset(tape);
        CHECK(mil_model_record(tape, model, &bag, NULL, NULL) == MIL_ERROR_ARGUMENT);
        CHECK(mil_model_record(tape, model, &bag, NULL, &out) == MIL_ERROR_ARGUMENT);          // the tape's first error stays
        mil_tape_reset(tape);
        CHECK(mil_model_record(tape, NULL, &bag, NULL, &out) == MIL_ERROR_ARGUMENT);
        mil_tape_reset(tape);
        CHECK(mil_model_record(tape, model, NULL, NULL, &out) == MIL_ERROR_ARGUMENT);
        mil_tape_reset(tape);
        bag.mask = mil_tensor_make(x, MIL_F32, 2, wrong);
        CHECK(mil_model_record(tape, model, &bag, NULL, &out) == MIL_ERROR_ARGUMENT);
        CHECK_CONTAINS(mil_error(ctx), "mask");
        mil_tape_free(tape);
        mil_model_free(model);
    }
    mil_context_free(ctx);
}

TEST(class_names_parameters_and_keys_are_checked)
{
    static const char *const names[] = { "a", "b" }, *const hole[] = { "a", NULL };
    mil_context *ctx = context();
    mil_model *two = mil_create(ctx, "abmil", "in_dim=2 embed_dim=2 attn_dim=2"), *one = mil_create(ctx, "abmil", "in_dim=2 embed_dim=2 attn_dim=2 num_classes=1");
    if (!CHECK(two && one)) return;
    CHECK(mil_model_set_class_names(two, NULL, 2) == MIL_ERROR_ARGUMENT && mil_model_set_class_names(two, names, 1) == MIL_ERROR_ARGUMENT);
    CHECK(mil_model_set_class_names(two, hole, 2) == MIL_ERROR_ARGUMENT && !mil_model_class_name(two, 0));
    CHECK(mil_model_set_class_names(one, names, 2) == MIL_OK && mil_model_set_class_names(one, names, 1) == MIL_OK && !mil_model_class_name(one, 1));
    CHECK(mil_model_set_class_names(two, names, 2) == MIL_OK && mil_model_set_class_names(two, hole, 2) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_model_class_name(two, 1), "b");
    CHECK(!mil_model_class_name(two, -1) && !mil_model_class_name(two, 2) && !mil_model_param(two, -1) && !mil_model_param(two, mil_model_param_count(two)));
    CHECK(!mil_model_option(two, NULL) && !mil_model_option(two, "colour") && !mil_model_metadata(two, NULL) && !mil_model_metadata(two, "x"));
    CHECK(!mil_model_find(two, NULL) && !mil_model_find(two, "x"));

    mil_param *p = mil_model_param(two, 0);
    mil_real values[64] = { 0 };
    char key[128];
    snprintf(key, sizeof key, "model.%s", p->key);
    CHECK(mil_model_find(two, p->key) == p && mil_model_find(two, key) == p);
    CHECK(mil_param_read(p, values, p->count + 1) == MIL_ERROR_ARGUMENT && mil_param_read(p, NULL, p->count) == MIL_ERROR_ARGUMENT);
    CHECK(mil_param_write(p, values, p->count + 1) == MIL_ERROR_ARGUMENT && mil_param_write(p, NULL, p->count) == MIL_ERROR_ARGUMENT);
    CHECK(mil_param_write(p, values, p->count) == MIL_OK && mil_param_read(p, values, p->count) == MIL_OK);
    mil_param_freeze(p, 1);
    CHECK(p->frozen == 1);
    mil_param_freeze(p, 0);
    CHECK(p->frozen == 0);
    mil_model_free(two);
    mil_model_free(one);
    mil_context_free(ctx);
}

TESTS(T(questions_about_nothing_have_harmless_answers) T(codes_that_do_not_exist_have_no_name) T(shapes_that_no_memory_holds_have_no_count)
      T(a_fixed_block_is_whole_again_after_frees_in_any_order) T(an_array_too_long_for_memory_is_an_error) T(an_arena_without_a_mark_is_emptied)
      T(names_longer_than_64_letters_are_compared_by_their_beginning) T(utf8_is_told_from_other_bytes) T(json_strings_cut_or_misspelt_are_refused)
      T(json_texts_are_compared_character_by_character) T(numbers_end_where_their_text_ends) T(reasons_of_the_system_are_sentences)
      T(files_of_other_kinds_are_recognised) T(safetensors_questions_outside_the_file_find_nothing) T(safetensors_plans_that_cannot_be_written_are_refused)
      T(safetensors_empty_tensors_may_stand_anywhere) T(halves_are_converted_alike_on_every_tier)
      T(bytes_are_swapped_whatever_their_number) T(npy_oddities) T(options_of_every_type_are_set_or_refused) T(options_are_printed_at_any_room) T(models_of_ones_own_are_refused_by_name)
      T(bags_with_more_in_them) T(class_names_parameters_and_keys_are_checked) T(a_fixed_block_that_is_null_is_refused))
