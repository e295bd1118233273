// Everything from one fixed block of memory, without an allocator, a file system or threads: for firmware.
//
// The library is built without malloc (MIL_MALLOC and friends give nothing); all that it needs lies in `block`, and how much a
// slide of N patches takes can be asked beforehand. Weights are read where they stand: in flash, say.
//
//     cc -O2 fixed_memory.c -lm && ./a.out
//
// Expected output:
// weights: yes, a slide of 20000 patches: yes, of 10000000: no
// 5000 patches: logits 0.182 -0.358
// 20000 patches: logits 0.203 -0.357
// a patch that is not a number: mil_scorer_push: row 2 of this call holds NaN or infinity
// and the slide is as before: 20000 patches
#define MIL_NO_STDIO
#define MIL_NO_THREADS
#define MIL_NO_TRAINING
#define MIL_NO_METRICS
#define MIL_MALLOC(size) ((void)(size), (void *)0)
#define MIL_REALLOC(block, size) ((void)(block), (void)(size), (void *)0)
#define MIL_FREE(block) ((void)(block))
#define MIL_IMPLEMENTATION
#include "mil.h"
#include <math.h>
#include <stdio.h>

enum { D = 32, ROWS = 50 };

static unsigned char block[2 << 20];                      // all memory there is
static unsigned char flash[16 << 10];                     // a safetensors file; a product links it in

// What a product does on its development machine: trains a model and saves it.
static mil_status write_flash(size_t *size)
{
    mil_context_options options = mil_context_options_default();
    options.memory = block;
    options.memory_size = sizeof block;
    mil_context *ctx;
    if (mil_context_create(&ctx, &options) != MIL_OK) return MIL_ERROR_NO_MEMORY;
    mil_model *model = mil_create(ctx, "abmil", "in_dim=32 embed_dim=32 attn_dim=16");
    *size = sizeof flash;
    const mil_status status = model ? mil_save_memory(model, flash, size) : mil_error_status(ctx);
    mil_model_free(model);
    mil_context_free(ctx);
    return status;
}

static void scan(float rows[ROWS][D])                     // patches from somewhere
{
    static uint32_t state = 1;
    for (int i = 0; i < ROWS * D; i++) {
        state = state * 1664525u + 1013904223u;
        rows[i / D][i % D] = (float)(state >> 8) / (1 << 23) - 1;
    }
}

int main(void)
{
    static float rows[ROWS][D];
    size_t size;
    if (write_flash(&size) != MIL_OK) return 1;

    mil_context_options options = mil_context_options_default();
    options.memory = block;
    options.memory_size = sizeof block;
    options.threads = 1;
    mil_context *ctx;
    if (mil_context_create(&ctx, &options) != MIL_OK) return 1;
    mil_model *model = mil_open_memory(ctx, flash, size);
    if (!model) { puts(mil_error(ctx)); return 1; }

    // How large may a slide be? Ask, don't guess.
    mil_scorer_options wanted = mil_scorer_options_default();
    wanted.capacity = 20000;
    const size_t room = sizeof block - mil_context_bytes(ctx) - 4096;          // less the block's own book-keeping
    printf("weights: yes, a slide of 20000 patches: %s, of 10000000: %s\n", mil_scorer_bytes(model, &wanted, 20000) <= room ? "yes" : "no",
           mil_scorer_bytes(model, &wanted, 10000000) <= room ? "yes" : "no");

    mil_scorer *scorer = mil_scorer_create(model, &wanted);                    // from here on nothing is allocated
    mil_status status = scorer ? MIL_OK : mil_error_status(ctx);
    float logits[2];
    for (int n = ROWS; n <= 20000 && status == MIL_OK; n += ROWS) {
        scan(rows);
        status = mil_scorer_push(scorer, rows, ROWS, 0, MIL_F32);
        if (status != MIL_OK || (n != 5000 && n != 20000)) continue;
        status = mil_scorer_read(scorer, MIL_LOGITS, logits, 2);
        if (status == MIL_OK) printf("%d patches: logits %.3f %.3f\n", n, (double)logits[0], (double)logits[1]);
    }
    if (status == MIL_OK) {
        rows[2][7] = NAN;                                 // a broken sensor
        if (mil_scorer_push(scorer, rows, ROWS, 0, MIL_F32) != MIL_OK) printf("a patch that is not a number: %s\n", mil_error(ctx));
        printf("and the slide is as before: %d patches\n", (int)mil_scorer_instances(scorer));
    } else puts(mil_error(ctx));

    mil_scorer_free(scorer);
    mil_model_free(model);
    mil_context_free(ctx);
    return status != MIL_OK;
}
