// Firmware in small: the embedded set of macros, no allocator, everything in one fixed block, no threads, no files. Scores a
// bag that comes patch by patch and prints the logits; tests/embedded.sh runs it on the host and on an emulated machine and
// compares the two. The weights come from a seed, so that both have the same.
#define MIL_NO_STDIO
#define MIL_NO_THREADS
#define MIL_NO_TRAINING
#define MIL_NO_METRICS
#define MIL_STATIC
#define MIL_ONLY_MODELS
#define MIL_MODEL_ABMIL
#define MIL_MALLOC(size) ((void)(size), (void *)0)
#define MIL_REALLOC(block, size) ((void)(block), (void)(size), (void *)0)
#define MIL_FREE(block) ((void)(block))
static int embedded_faults;                                // an assertion that fails stops nothing, but is seen
#define MIL_ASSERT(x) ((x) ? (void)0 : (void)embedded_faults++)
#define MIL_IMPLEMENTATION
#include "mil.h"

static union { double align; unsigned char byte[1 << 20]; } block;

// Returns 0 when all went well. logits [2]
int embedded_run(double *logits, const char **sentence);
int embedded_run(double *logits, const char **sentence)
{
    static char error[256];
    mil_context *ctx;
    mil_context_options options = mil_context_options_default();
    options.memory = block.byte;
    options.memory_size = sizeof block;
    *sentence = error;
    if (mil_context_create(&ctx, &options) != MIL_OK) return 1;
    mil_status status = mil_selftest(ctx);
    mil_model *model = status == MIL_OK ? mil_create(ctx, "abmil", "in_dim=64 embed_dim=32 attn_dim=16") : NULL;
    mil_scorer *scorer = model ? mil_scorer_create(model, NULL) : NULL;
    mil_real y[2] = { 0, 0 };
    status = mil_error_status(ctx);
    const size_t peak = mil_context_peak_bytes(ctx);
    for (int n = 0; n < 200 && status == MIL_OK; n++) {
        float patch[64];
        for (int j = 0; j < 64; j++) patch[j] = (float)((n * 29 + j * 53 + n * j) % 127 - 63) / 32;
        status = mil_scorer_push(scorer, patch, 1, 0, MIL_F32);
    }
    if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_LOGITS, y, 2);
    logits[0] = (double)y[0];
    logits[1] = (double)y[1];
    memcpy(error, mil_error(ctx), sizeof error - 1);
    if (status == MIL_OK && mil_context_peak_bytes(ctx) != peak) { strcpy(error, "scoring allocated"); status = MIL_ERROR_NO_MEMORY; }
    mil_scorer_free(scorer);
    mil_model_free(model);
    mil_context_free(ctx);
    return status != MIL_OK || embedded_faults;
}

#ifndef EMBEDDED_NO_MAIN
#include <stdio.h>
int main(void)
{
    double logits[2];
    const char *sentence;
    const int failed = embedded_run(logits, &sentence);
    if (failed) printf("FAIL %s\n", sentence);
    else printf("logits %.7f %.7f\n", logits[0], logits[1]);
    return failed;
}
#endif
