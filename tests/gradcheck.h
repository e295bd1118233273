// Finite differences: a test gives a function that records a result from inputs, and inputs' shapes; the gradients by all
// inputs, for a random cotangent, must agree with central differences (double builds), and the value with itself under other
// plans (no row groups, no shared memory, poisoned memory) and thread counts, bit by bit.
#ifndef GRADCHECK_H
#define GRADCHECK_H
#include "mil.h"
#include <stdlib.h>
#include <string.h>

#define GRAD_MAX 6
typedef struct grad_case grad_case;
struct grad_case {
    mil_node *(*record)(mil_tape *tape, const grad_case *c, mil_node *const *in);
    int count;
    int rank[GRAD_MAX];
    int64_t shape[GRAD_MAX][4];
    int fixed;                                             // bit i: input i wants no gradient
    int training;
    int64_t i[6];                                          // for the function
    double r[2];
    double spread;                                         // of the random inputs, 0: 1
    void (*fill)(const grad_case *c, int input, mil_real *x, int64_t count);       // NULL: random
};

static uint64_t grad_state = 1;
static double grad_random(void)                            // in [-1, 1)
{
    grad_state = grad_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(grad_state >> 11) / 4503599627370496.0 - 1;
}

static int64_t grad_count(int rank, const int64_t *shape)
{
    int64_t n = 1;
    for (int a = 0; a < rank; a++) n *= shape[a];
    return n;
}

typedef struct { mil_context *ctx; mil_real *x[GRAD_MAX], *dx[GRAD_MAX], *y, *dy; int64_t n[GRAD_MAX], ny; } grad_run;

// Records and runs; y and dx (where wanted) are read. backward needs dy.
static int grad_forward(grad_run *g, const grad_case *c, int backward, int options, int threads)
{
    mil_context_options o = mil_context_options_default();
    mil_context *ctx;
    mil_tape *tape;
    mil_node *in[GRAD_MAX], *y, *dy = NULL, *dx[GRAD_MAX];
    int ok;
    o.threads = threads;
    if (mil_context_create(&ctx, &o) != MIL_OK || mil_tape_create(ctx, &tape) != MIL_OK) return 0;
    mil_tape_training(tape, c->training);
    mil_tape_seed(tape, 7, 3);
    if (options & 1) mil_tape_set(tape, MIL_TAPE_NO_GROUPS, 1);
    if (options & 2) mil_tape_set(tape, MIL_TAPE_NO_REUSE, 1);
    if (options & 4) mil_tape_set(tape, MIL_TAPE_POISON, 1);
    for (int i = 0; i < c->count; i++) {
        mil_tensor t = mil_tensor_make(g->x[i], MIL_REAL_DTYPE, c->rank[i], c->shape[i]);
        in[i] = mil_input(tape, "x", &t);
        if (backward && !(c->fixed >> i & 1)) mil_node_want_grad(in[i]);
    }
    y = c->record(tape, c, in);
    mil_node_keep(y);
    if (y && !g->y) {
        g->ny = y->count;
        g->y = (mil_real *)calloc((size_t)g->ny + 1, sizeof(mil_real));
        g->dy = (mil_real *)calloc((size_t)g->ny + 1, sizeof(mil_real));
        for (int64_t j = 0; j < g->ny; j++) g->dy[j] = (mil_real)grad_random();
    }
    if (backward && y) {
        mil_tensor t = mil_tensor_make(g->dy, MIL_REAL_DTYPE, y->rank, y->shape);
        dy = mil_input(tape, "dy", &t);
        mil_tape_backward_from(tape, &y, &dy, 1);
        for (int i = 0; i < c->count; i++) mil_node_keep(dx[i] = mil_node_grad(in[i]));
    }
    ok = mil_tape_run(tape) == MIL_OK;
    if (!ok) printf("%s\n", mil_error(ctx));
    if (ok && y) ok = mil_node_read(y, g->y, g->ny) == MIL_OK;
    for (int i = 0; ok && backward && i < c->count; i++) {
        if (c->fixed >> i & 1 || g->n[i] == 0) continue;
        ok = dx[i] && mil_node_read(dx[i], g->dx[i], g->n[i]) == MIL_OK;
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
    return ok;
}

static double grad_value(grad_run *g, const grad_case *c)
{
    double sum = 0;
    if (!grad_forward(g, c, 0, 0, 1)) return sqrt(-1.0);
    for (int64_t j = 0; j < g->ny; j++) sum += (double)g->y[j] * (double)g->dy[j];
    return sum;
}

// check (NULL: none) compares y with a plain reference.
static void grad_check(const grad_case *c, void (*check)(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count))
{
    grad_run g;
    mil_real *y, *dx[GRAD_MAX];
    memset(&g, 0, sizeof g);
    memset(dx, 0, sizeof dx);
    for (int i = 0; i < c->count; i++) {
        g.n[i] = grad_count(c->rank[i], c->shape[i]);
        g.x[i] = (mil_real *)calloc((size_t)g.n[i] + 1, sizeof(mil_real));
        g.dx[i] = (mil_real *)calloc((size_t)g.n[i] + 1, sizeof(mil_real));
        dx[i] = (mil_real *)calloc((size_t)g.n[i] + 1, sizeof(mil_real));
        for (int64_t j = 0; j < g.n[i]; j++) g.x[i][j] = (mil_real)(grad_random() * (c->spread != 0 ? c->spread : 1));
        if (c->fill) c->fill(c, i, g.x[i], g.n[i]);
    }
    if (!CHECK(grad_forward(&g, c, 1, 0, 1))) goto done;
    if (check) check(c, g.x, g.y, g.ny);
    y = (mil_real *)malloc((size_t)(g.ny + 1) * sizeof *y);
    memcpy(y, g.y, (size_t)g.ny * sizeof *y);
    for (int i = 0; i < c->count; i++) memcpy(dx[i], g.dx[i], (size_t)g.n[i] * sizeof(mil_real));
    for (int way = 1; way < 5; way++) {
        CHECK(grad_forward(&g, c, 1, way == 1 ? 1 : way == 2 ? 4 : way == 3 ? 6 : 0, way == 4 ? 3 : 1));
        CHECK(memcmp(y, g.y, (size_t)g.ny * sizeof *y) == 0);
        for (int i = 0; i < c->count; i++)
            if (way > 1 && !(c->fixed >> i & 1)) CHECK(memcmp(dx[i], g.dx[i], (size_t)g.n[i] * sizeof(mil_real)) == 0);
    }
    if (sizeof(mil_real) == 8)
        for (int i = 0; i < c->count; i++) {
            if (c->fixed >> i & 1) continue;
            const int64_t step = g.n[i] / 40 + 1;          // about 40 elements of each input
            for (int64_t j = 0; j < g.n[i]; j += step) {
                const mil_real x = g.x[i][j], h = (mil_real)1e-5;
                double up, down;
                g.x[i][j] = x + h;
                up = grad_value(&g, c);
                g.x[i][j] = x - h;
                down = grad_value(&g, c);
                g.x[i][j] = x;
                if (!CHECK_NEAR(dx[i][j], (up - down) / (2 * (double)h), 1e-7)) printf("  input %d, element %lld\n", i, (long long)j);
            }
        }
    free(y);
done:
    for (int i = 0; i < c->count; i++) { free(g.x[i]); free(g.dx[i]); free(dx[i]); }
    free(g.y);
    free(g.dy);
}

#endif
