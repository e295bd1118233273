// Streams patches from a scanner: pushed stripe by stripe as the encoder delivers them, with the verdict so far at any time.
//
// The scorer keeps running maxima and sums, not patches: beside the attention scores that are asked for, its memory does not grow
// with the slide. However the patches are cut into pushes, the bits of the result are the same.
//
//     cc -O2 stream.c -lm -lpthread && ./a.out
//
// Expected output:
// stripe  1:   48 patches, p = 0.386, most attention to stripe 1, patch 43
// stripe  4:  192 patches, p = 0.371, most attention to stripe 3, patch 28
// stripe  7:  336 patches, p = 0.367, most attention to stripe 3, patch 28
// stripe 10:  480 patches, p = 0.368, most attention to stripe 3, patch 28
// memory held: the same before and after
#define MIL_IMPLEMENTATION
#include "mil.h"
#include <stdio.h>
#include <string.h>

enum { D = 64, STRIPES = 10, PATCHES = 48 };

// What the encoder says of one stripe: PATCHES rows of D values in bfloat16, the upper half of a float. Here it is noise.
static void scan_stripe(int stripe, uint16_t rows[PATCHES][D])
{
    uint32_t state = (uint32_t)stripe * 77777u, bits;
    for (int n = 0; n < PATCHES; n++)
        for (int d = 0; d < D; d++) {
            state = state * 1664525u + 1013904223u;
            const float x = (float)(state >> 8) / (1 << 23) - 1;
            memcpy(&bits, &x, sizeof bits);
            rows[n][d] = (uint16_t)(bits >> 16);
        }
}

int main(void)
{
    static uint16_t rows[PATCHES][D];
    static float attention[STRIPES * PATCHES];
    float p[2];
    mil_context *ctx;
    if (mil_context_create(&ctx, NULL) != MIL_OK) return 1;

    mil_model *model = mil_create(ctx, "abmil", "in_dim=64 embed_dim=32 attn_dim=16");       // or mil_open(ctx, "weights.safetensors")
    mil_scorer_options options = mil_scorer_options_default();
    options.capacity = 4096;                              // reserve for a large slide: pushes then allocate nothing
    mil_scorer *scorer = mil_scorer_create(model, &options);
    const size_t before = mil_context_bytes(ctx);
    mil_status status = mil_error_status(ctx);

    for (int stripe = 1; stripe <= STRIPES && status == MIL_OK; stripe++) {
        scan_stripe(stripe, rows);
        status = mil_scorer_push(scorer, rows, PATCHES, 0, MIL_BF16);
        if (status != MIL_OK || stripe % 3 != 1) continue;

        // The verdict so far. Asking changes nothing in what follows.
        const int64_t N = mil_scorer_instances(scorer);
        status = mil_scorer_read(scorer, MIL_PROBABILITIES, p, 2);
        if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_ATTENTION, attention, N);
        if (status != MIL_OK) break;
        int top = 0;
        for (int n = 1; n < (int)N; n++) if (attention[n] > attention[top]) top = n;
        printf("stripe %2d: %4d patches, p = %.3f, most attention to stripe %d, patch %d\n", stripe, (int)N, (double)p[1], top / PATCHES + 1, top % PATCHES);
    }
    if (status == MIL_OK) printf("memory held: %s before and after\n", mil_context_bytes(ctx) == before ? "the same" : "not the same");
    else fprintf(stderr, "%s\n", mil_error(ctx));

    mil_scorer_free(scorer);
    mil_model_free(model);
    mil_context_free(ctx);
    return status != MIL_OK;
}
