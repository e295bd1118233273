// JSON: any bytes are accepted or refused; of what is accepted every value is visited, and numbers and texts are read.
// The reader is private, so the implementation is taken in here as a private copy.
#define MIL_STATIC
#define MIL_IMPLEMENTATION
#include "fuzz.h"

static void visit(mili_json v, int depth)
{
    FUZZ_CHECK(depth <= 8 && v.size > 0);
    const char kind = mili_json_kind(v);
    int64_t n = 0, ints[4], count = 0;
    double x = 0;
    int flag = 0, nul = 0;
    if (mili_json_int(v, &n)) FUZZ_CHECK(mili_json_double(v, &x) && (double)n == x);
    if (mili_json_double(v, &x)) {
        char text[32];
        double again;
        mili_json one;
        mili_json_number(text, x);
        one.text = text;
        one.size = strlen(text);
        FUZZ_CHECK(mili_is_finite_f64(x) && mili_json_double(one, &again) && again == x);
    }
    mili_json_bool(v, &flag);
    mili_json_ints(v, ints, 4, &count);
    if (kind == '"') {
        const size_t size = mili_json_copy(v, NULL, 0, &nul);
        char *copy = (char *)malloc(size + 1), *written = (char *)malloc(6 * size + 3);
        FUZZ_CHECK(copy && written && mili_json_copy(v, copy, size + 1, &nul) == size);
        if (!nul) {                                        // escaped again it is the same text
            mili_json again;
            const size_t length = mili_json_string(written, 6 * size + 3, copy);
            FUZZ_CHECK(length <= 6 * size + 2);
            again.text = written;
            again.size = length;
            FUZZ_CHECK(mili_json_equal(v, copy) && mili_json_equal(again, copy));
        }
        free(copy);
        free(written);
    }
    if (kind == '{' || kind == '[') {
        mili_json key, value;
        mili_json_iter it = mili_json_begin(v);
        int64_t seen = 0;
        while (mili_json_next(&it, &key, &value)) {
            if (kind == '{') visit(key, depth + 1);
            visit(value, depth + 1);
            seen++;
        }
        FUZZ_CHECK(seen == mili_json_count(v));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    mil_context *ctx = fuzz_context();
    const size_t before = fuzz_live;
    mili_json v;
    char *exact = (char *)malloc(size ? size : 1);
    FUZZ_CHECK(exact != NULL);
    if (size) memcpy(exact, data, size);
    mil_error_clear(ctx);
    const mil_status status = mili_json_parse(ctx, "fuzz", exact, size, 7, &v);
    fuzz_status(ctx, status);
    if (status == MIL_OK) {
        visit(v, 0);
        if (mili_json_kind(v) == '{') mili_json_check_unique(ctx, "fuzz", v);
    }
    FUZZ_CHECK(fuzz_live == before);
    free(exact);
    return 0;
}
