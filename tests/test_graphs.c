// build: float double
// Graphs that chance draws, forward and backward: whatever is recorded, the values are the same bits with and without shared memory,
// poisoned memory, recomputation, other threads, the caller's own workspace of just the bytes that were asked for, and when run again;
// and node by node they agree. MIL_TEST_ROUNDS in the environment sets how many graphs.
#include "mil.h"
#include "check.h"
#include "memory.h"

enum { NODES = 26, KEPT = 8, LARGEST = 120000, WIDEST = 140, PARAMS = 4, OUTS = KEPT + PARAMS + 4 };

typedef struct graph {
    uint64_t  chance;
    mil_node *node[NODES], *out[OUTS];
    int       count, outs, smooth;                         // smooth: nothing was chosen by its value
} graph;

static mil_real data[2][LARGEST], weights[PARAMS][WIDEST * WIDEST];
static mil_param params[PARAMS];

static int chance(graph *g, int n) { return memory_chance(&g->chance, n); }

static mil_node *any(graph *g) { return g->node[chance(g, 3) ? g->count - 1 - chance(g, g->count < 5 ? g->count : 5) : chance(g, g->count)]; }

// A node that broadcasts with x [B, N, E] and has its shape or less; x itself if there is none.
static mil_node *fitting(graph *g, mil_node *x)
{
    for (int tries = 0; tries < 12; tries++) {
        mil_node *y = any(g);
        int fits = y->rank == 3;
        for (int a = 0; fits && a < 3; a++) fits = y->shape[a] == x->shape[a] || y->shape[a] == 1;
        if (fits) return y;
    }
    return x;
}

static mil_node *unary(graph *g, mil_node *x)
{
    switch (chance(g, 8)) {
    case 0: return mil_tanh(x);
    case 1: return mil_sigmoid(x);
    case 2: return mil_gelu(x);
    case 3: return mil_silu(x);
    case 4: return mil_softplus(x);
    case 5: return mil_square(mil_tanh(x));
    case 6: return mil_exp(mil_clamp(x, -3, 1));
    default: return mil_affine(x, 0.5 + 0.25 * chance(g, 4), 0.1);
    }
}

// One more node of rank 3 out of those before; x when the draw does not fit.
static mil_node *grow(graph *g, mil_tape *tape)
{
    static const int swap[3] = { 1, 0, 2 }, turn[3] = { 0, 2, 1 };
    mil_node *x = any(g), *y = fitting(g, x);
    const int64_t B = x->shape[0], N = x->shape[1], E = x->shape[2];
    int64_t shape[3];
    shape[0] = B;
    shape[1] = N;
    shape[2] = E;
    switch (chance(g, 30)) {
    case 0: case 1: case 2: return unary(g, x);
    case 3: return mil_add(x, y);
    case 4: return mil_sub(y, x);
    case 5: return mil_mul(x, mil_tanh(y));
    case 6: return mil_div(x, mil_affine(mil_square(y), 1, 1));
    case 7: case 8: case 9:
        if (E > WIDEST) break;
        { mil_param *p = &params[chance(g, PARAMS)];       // [WIDEST, WIDEST]; a corner of it, that x then is no larger
        const int most = N < 1000 ? WIDEST : 8;
        mil_node *w = mil_slice(mil_slice(mil_use(tape, p), 1, 0, E), 0, 0, 1 + chance(g, most));
        return mil_tanh(mil_linear(x, w, NULL)); }
    case 10: return mil_mean(x, 1);
    case 11: return mil_sum(mil_affine(x, 0.1, 0), chance(g, 3));
    case 12: return mil_logsumexp(x, 1 + chance(g, 2));
    case 13: return mil_softmax(x, 1 + chance(g, 2));
    case 14: return mil_log_softmax(x, -1);
    case 15: return mil_layer_norm(x, NULL, NULL, 1e-2);
    case 16: return N > 1 ? mil_slice(x, 1, chance(g, (int)(N / 2)), 1 + chance(g, (int)(N / 2))) : x;
    case 17: { mil_node *two[2]; two[0] = x; two[1] = mil_affine(x, -1, 0.5); return N * E < 3000 ? mil_concat(two, 2, 1 + chance(g, 2)) : x; }
    case 18: return mil_pad(x, 1, chance(g, 3), chance(g, 3));
    case 19: return E < 300 && N < 300 ? mil_transpose(x) : x;
    case 20: return B < 3 ? mil_permute(x, chance(g, 2) && N < 300 && E < 300 ? turn : swap) : x;
    case 21: return mil_softmax_pool(mil_slice(x, 2, 0, 1), x);
    case 22: return N <= 200 || B > 1 ? mil_tanh(mil_matmul_t(mil_slice(x, 1, 0, N < 40 ? N : 40), mil_affine(x, 1 / (double)E, 0), 0, 1)) : x;
    case 23: return mil_attention(x, x, x, 1, 0, NULL, chance(g, 2) ? 0.2 : 0, "attention");
    case 24: return mil_attention(mil_slice(x, 1, 0, 1), x, unary(g, x), 1, 0, NULL, 0, NULL);
    case 25: return mil_dropout(x, 0.3, "drop");
    case 26: return mil_run_mean(x, 3, (3 - N % 3) % 3);
    case 27: return mil_detach(x);
    case 28: {
        g->smooth = 0;
        if (chance(g, 2)) return mil_max(x, 1 + chance(g, 2));
        mil_node *index = mil_topk(mil_slice(x, 2, 0, 1), 1 + chance(g, N < 4 ? (int)N : 4), 1, 1);    // [B, k, 1]
        return mil_gather_rows(x, index); }
    default:
        shape[1] = 1;
        shape[2] = N * E;
        return N * E < 300 ? mil_reshape(x, 3, shape) : x;
    }
    return x;
}

static void add(graph *g, mil_node *n) { if (n && n->rank == 3 && n->count <= LARGEST && n->count > 0) g->node[g->count++] = n; }

static void keep(graph *g, mil_node *n)
{
    if (!n || g->outs == OUTS) return;
    mil_node_keep(n);
    g->out[g->outs++] = n;
}

// The same seed gives the same graph.
static void record(graph *g, mil_tape *tape, uint64_t seed, int train)
{
    memset(g, 0, sizeof *g);
    g->chance = seed * 2 + 1;
    g->smooth = 1;
    mil_tape_training(tape, train);
    for (int i = 0; i < 2; i++) {
        // Mostly small; some of several tiles, some of several waves, some with weights whose gradients are deferred.
        const int large = chance(g, 8);
        const int64_t shape[3] = { 1 + chance(g, 3), large == 0 ? 4000 + chance(g, 1000) : large < 3 ? 100 + chance(g, 500) : 1 + chance(g, 40),
                                   large == 0 ? 1 + chance(g, 8) : large == 1 ? 1 + chance(g, 60) : 1 + chance(g, 24) };
        const mil_tensor t = mil_tensor_make(data[i], MIL_REAL_DTYPE, 3, shape);
        mil_node *x = mil_input(tape, i ? "b" : "a", &t);
        if (train && chance(g, 2)) mil_node_want_grad(x);
        add(g, x);
    }
    const int leaves = g->count;
    for (int tries = 0; g->count < NODES && tries < 3 * NODES; tries++) add(g, grow(g, tape));
    for (int i = 0; i < KEPT / 2; i++) keep(g, g->node[chance(g, g->count)]);
    if (!train) return;
    mil_node *loss = NULL;
    for (int i = 0; i < 4; i++) {
        mil_node *part = mil_mean(mil_mean(mil_mean(mil_square(g->node[g->count - 1 - chance(g, g->count < 8 ? g->count : 8)]), 0), 1), 2);
        loss = loss ? mil_add(loss, part) : part;
    }
    keep(g, loss);
    mil_tape_backward(tape, loss);
    for (int i = 0; i < PARAMS; i++) keep(g, mil_node_grad(mil_use(tape, &params[i])));
    for (int i = 0; i < leaves; i++) keep(g, mil_node_grad(g->node[i]));
}

// What a later run makes of what was kept.
static void record_more(graph *g, mil_tape *tape)
{
    mil_node *kept[OUTS];
    int count = 0;
    for (int i = 0; i < g->outs; i++) if (g->out[i]->rank == 3) kept[count++] = g->out[i];
    memset(g->node, 0, sizeof g->node);
    g->count = g->outs = 0;
    mil_tape_training(tape, 0);
    for (int i = 0; i < count; i++) add(g, kept[i]);
    for (int tries = 0; g->count && g->count < NODES && tries < NODES; tries++) add(g, grow(g, tape));
    for (int i = 0; i < KEPT / 2 && g->count; i++) keep(g, g->node[g->count - 1 - chance(g, g->count < 8 ? g->count : 8)]);
}

typedef struct answer { void *bytes[OUTS]; size_t size[OUTS]; int count; } answer;

static int read_answer(const graph *g, answer *a)
{
    memset(a, 0, sizeof *a);
    for (int i = 0; i < g->outs; i++) {
        a->size[i] = (size_t)g->out[i]->count * sizeof(mil_real);
        a->bytes[i] = malloc(a->size[i]);
        a->count++;
        if (!CHECK(mil_node_read(g->out[i], a->bytes[i], g->out[i]->count) == MIL_OK)) return 0;
    }
    return 1;
}

static void free_answer(answer *a) { for (int i = 0; i < a->count; i++) free(a->bytes[i]); }

static int same(const answer *a, const answer *b)
{
    if (a->count != b->count) return 0;
    for (int i = 0; i < a->count; i++) if (a->size[i] != b->size[i] || memcmp(a->bytes[i], b->bytes[i], a->size[i]) != 0) return printf("  result %d of %d differs\n", i, a->count), 0;
    return 1;
}

static double distance(const answer *a, const answer *b)   // of values, relative to the largest of each result
{
    double worst = 0;
    for (int i = 0; i < a->count; i++) {
        const mil_real *x = (const mil_real *)a->bytes[i], *y = (const mil_real *)b->bytes[i];
        double size = 1e-3, off = 0;
        for (size_t k = 0; k < a->size[i] / sizeof *x; k++) {
            const double d = fabs((double)x[k] - (double)y[k]);
            if (fabs((double)x[k]) > size) size = fabs((double)x[k]);
            if (!(d <= off)) off = d;
        }
        if (!(off / size <= worst)) worst = off / size;
    }
    return worst;
}

typedef struct mode { const char *name; int option[2], options, threads, workspace, approximate; } mode;
static const mode modes[] = {
    { "planned", { 0, 0 }, 0, 1, 0, 0 },
    { "poisoned", { MIL_TAPE_POISON, 0 }, 1, 1, 0, 0 },
    { "unshared", { MIL_TAPE_NO_REUSE, MIL_TAPE_POISON }, 2, 1, 0, 0 },
    { "recomputed", { MIL_TAPE_RECOMPUTE, MIL_TAPE_POISON }, 2, 1, 0, 0 },
    { "with the caller's memory", { MIL_TAPE_POISON, 0 }, 1, 1, 1, 0 },
    { "by a host's three threads", { 0, 0 }, 0, 3, 0, 0 },
    { "node by node", { MIL_TAPE_NO_GROUPS, MIL_TAPE_POISON }, 2, 1, 0, 1 },
};

TEST(graphs_have_the_same_values_however_they_are_run)
{
    const int rounds = check_rounds(80);
    static memory mem;
    uint64_t noise = 11;
    int smooth = 0;
    for (int k = 0; k < 2; k++) for (int i = 0; i < LARGEST; i++) data[k][i] = (mil_real)memory_noise(&noise);
    for (int k = 0; k < PARAMS; k++) {
        for (int i = 0; i < WIDEST * WIDEST; i++) weights[k][i] = (mil_real)(0.5 * memory_noise(&noise));
        memset(&params[k], 0, sizeof params[k]);
        params[k].key = "w";
        params[k].dtype = MIL_REAL_DTYPE;
        params[k].rank = 2;
        params[k].shape[0] = params[k].shape[1] = WIDEST;
        params[k].count = WIDEST * WIDEST;
        params[k].trainable = 1;
        params[k].data = weights[k];
    }
    for (int round = 0; round < rounds; round++) {
        const int train = round & 1, failures = check_failures;
        answer first, second;
        memset(&first, 0, sizeof first);
        memset(&second, 0, sizeof second);
        for (int m = 0; m < (int)(sizeof modes / sizeof *modes); m++) {
            long loops = 0;
            mil_context *ctx = memory_context(&mem, modes[m].threads, modes[m].threads > 1 ? &loops : NULL);
            mil_tape *tape = NULL;
            graph g;
            answer a;
            CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
            for (int i = 0; i < modes[m].options; i++) mil_tape_set(tape, (mil_tape_option)modes[m].option[i], 1);
            mil_tape_seed(tape, 3, (uint64_t)round);
            record(&g, tape, (uint64_t)round, train);
            const size_t bytes = mil_tape_bytes(tape);
            CHECK(bytes > 0 && mil_tape_bytes(tape) == bytes);                 // asking changes nothing
            void *own = modes[m].workspace ? malloc(bytes + 63) : NULL;
            char *aligned = own ? (char *)own + (64 - (uintptr_t)own % 64) % 64 : NULL;
            if (own) mil_tape_workspace(tape, aligned, bytes);
            const mil_status status = mil_tape_run(tape);
            if (!CHECK(status == MIL_OK)) printf("  graph %d, %s: %s\n", round, modes[m].name, mil_error(ctx));
            memset(&a, 0, sizeof a);
            if (status == MIL_OK && read_answer(&g, &a)) {
                if (m == 0) {
                    first = a;
                    answer again;
                    CHECK(mil_tape_rerun(tape) == MIL_OK && read_answer(&g, &again) && same(&first, &again));
                    free_answer(&again);
                    smooth += g.smooth;
                } else if (!modes[m].approximate) CHECK(same(&first, &a));
                else if (g.smooth && !CHECK(distance(&first, &a) < (MIL_REAL_IS_FLOAT ? 2e-3 : 1e-10))) printf("  off by %g\n", distance(&first, &a));
            }
            if (m) free_answer(&a);
            memset(&a, 0, sizeof a);
            if (own) mil_tape_workspace(tape, NULL, 0);
            if (status == MIL_OK && !own) {
                record_more(&g, tape);
                if (CHECK(mil_tape_run(tape) == MIL_OK) && read_answer(&g, &a) && m && !modes[m].approximate) CHECK(same(&second, &a));
            }
            if (m == 0) second = a;
            else free_answer(&a);
            mil_tape_free(tape);
            free(own);
            mil_context_free(ctx);
            CHECK(mem.bytes == 0);
            if (check_failures > failures) { printf("  graph %d, %s\n", round, modes[m].name); break; }
        }
        free_answer(&first);
        free_answer(&second);
    }
    CHECK(rounds < 20 || smooth > rounds / 4);
}

TESTS(T(graphs_have_the_same_values_however_they_are_run))
