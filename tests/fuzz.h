// What the fuzz targets share: a context whose allocator has a limit and is checked for leaks after every input, and a way
// to score a bag with whatever model an input gave. A broken promise traps, so that the fuzzer keeps the input.
#ifndef FUZZ_H
#define FUZZ_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "mil.h"

#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FUZZ_CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x); abort(); } } while (0)

static size_t fuzz_live, fuzz_peak, fuzz_limit = (size_t)4 << 20;              // bytes now, at most in this input, allowed

static void *fuzz_reallocate(void *user, void *block, size_t old_size, size_t new_size)
{
    (void)user;
    if (new_size == 0) {
        fuzz_live -= block ? old_size : 0;
        free(block);
        return NULL;
    }
    if (new_size > fuzz_limit || fuzz_live - old_size + new_size > fuzz_limit) return NULL;
    void *p = realloc(block, new_size);
    if (!p) return NULL;
    fuzz_live += new_size - (block ? old_size : 0);
    if (fuzz_live > fuzz_peak) fuzz_peak = fuzz_live;
    return p;
}

// An input that begins with { is a header alone and data behind a 0 byte: `magic` and the header's length, in `digits` bytes, are
// put in front of it. Returns the new bytes, to be freed, and sets data and size to them; NULL for any other input.
static inline uint8_t *fuzz_header(const uint8_t **data, size_t *size, const char *magic, size_t magic_size, size_t digits)
{
    if (*size <= 1 || (*data)[0] != '{') return NULL;
    const uint8_t *end = (const uint8_t *)memchr(*data, 0, *size);
    const size_t header = end ? (size_t)(end - *data) : *size, rest = end ? *size - header - 1 : 0, front = magic_size + digits;
    uint8_t *bytes = (uint8_t *)malloc(front + header + rest);
    FUZZ_CHECK(bytes != NULL);
    memcpy(bytes, magic, magic_size);
    for (size_t i = 0; i < digits; i++) bytes[magic_size + i] = (uint8_t)((uint64_t)header >> (8 * i));
    memcpy(bytes + front, *data, header);
    if (rest) memcpy(bytes + front + header, end + 1, rest);
    *size = front + header + rest;
    *data = bytes;
    return bytes;
}

// One context for all inputs: what an input leaves behind in it would show.
static inline mil_context *fuzz_context(void)
{
    static mil_context *ctx;
    if (!ctx) {
        mil_context_options options = mil_context_options_default();
        options.allocator.reallocate = fuzz_reallocate;
        options.threads = 1;
        FUZZ_CHECK(mil_context_create(&ctx, &options) == MIL_OK);
    }
    fuzz_peak = fuzz_live;
    return ctx;
}

// After a call: a status and a sentence, or neither.
static inline void fuzz_status(mil_context *ctx, mil_status status)
{
    FUZZ_CHECK(status == mil_error_status(ctx));
    FUZZ_CHECK((status == MIL_OK) == (mil_error(ctx)[0] == 0));
}

// Scores five instances, whole and in two pieces: the same bits, or the same refusal.
static inline void fuzz_score(mil_model *model)
{
    mil_context *ctx = mil_model_context(model);
    const int64_t D = mil_model_in_dim(model);
    mil_real first[64], second[64];
    if (D < 1 || D > 64) return;
    float x[5 * 64];
    for (int64_t i = 0; i < 5 * D; i++) x[i] = (float)((i * 37 + 11) % 64 - 32) / 16;
    mil_scorer *scorer = mil_scorer_create(model, NULL);
    if (!scorer) { fuzz_status(ctx, mil_error_status(ctx)); return; }
    const mil_bag bag = mil_bag_make(x, 5, D);
    mil_status status = mil_scorer_score(scorer, &bag);
    fuzz_status(ctx, status);
    const int64_t C = mil_scorer_count(scorer, MIL_LOGITS);
    if (status == MIL_OK && C > 0 && C <= 64) {
        status = mil_scorer_read(scorer, MIL_LOGITS, first, C);
        fuzz_status(ctx, status);
        mil_scorer_reset(scorer);
        if (status == MIL_OK && mil_scorer_push(scorer, x, 2, 0, MIL_F32) == MIL_OK) {
            FUZZ_CHECK(mil_scorer_push(scorer, x + 2 * D, 3, 0, MIL_F32) == MIL_OK);
            FUZZ_CHECK(mil_scorer_read(scorer, MIL_LOGITS, second, C) == MIL_OK);
            FUZZ_CHECK(memcmp(first, second, (size_t)C * sizeof *first) == 0);
        }
    }
    mil_scorer_free(scorer);
}

#endif
