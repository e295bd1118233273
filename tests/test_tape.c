// build: float double
// Recording, planning and running: what the tape promises whatever is recorded on it.
#include <stdlib.h>
#include "mil.h"
#include "check.h"

#define COUNT(list) ((int)(sizeof list / sizeof *list))

// ---- helpers ----
static uint64_t random_state;
static double random_next(void)                            // in [-1, 1)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 11) * (2.0 / 9007199254740992.0) - 1;
}

static void fill(mil_real *x, int64_t n, uint64_t seed)
{
    random_state = seed;
    for (int64_t i = 0; i < n; i++) x[i] = (mil_real)random_next();
}

static mil_param param_make(const char *key, mil_real *data, int rank, int64_t d0, int64_t d1)
{
    mil_param p;
    memset(&p, 0, sizeof p);
    p.key = key;
    p.dtype = MIL_REAL_DTYPE;
    p.rank = rank;
    p.shape[0] = d0;
    p.shape[1] = d1;
    p.count = rank == 2 ? d0 * d1 : d0;
    p.trainable = 1;
    p.data = data;
    return p;
}

static mil_context *context_new(int threads)
{
    mil_context_options options = mil_context_options_default();
    mil_context *ctx = NULL;
    options.threads = threads;
    mil_context_create(&ctx, &options);
    return ctx;
}

static mil_tape *tape_new(mil_context *ctx)
{
    mil_tape *tape = NULL;
    mil_tape_create(ctx, &tape);
    return tape;
}

static mil_node *reals(mil_tape *tape, const mil_real *data, int rank, int64_t d0, int64_t d1, int64_t d2)
{
    int64_t shape[3];
    shape[0] = d0;
    shape[1] = d1;
    shape[2] = d2;
    const mil_tensor t = mil_tensor_make(data, MIL_REAL_DTYPE, rank, shape);
    return mil_input(tape, "x", &t);
}

static double read_one(mil_node *n)
{
    mil_real v = 0;
    CHECK(mil_node_read(n, &v, 1) == MIL_OK);
    return (double)v;
}

static mil_node *matrix(mil_tape *tape, int64_t rows, int64_t cols)
{
    const int64_t shape[2] = { rows, cols };
    return mil_constant(tape, 2, shape, 1);
}

// ---- a net that has a bit of everything: row groups, reductions with small and large states, views, batches, draws ----
enum { NET_D = 70, NET_E = 260, NET_A = 6, NET_K = 2, NET_C = 3, NET_OUT = 24, NET_PARAMS = 10, NET_MAX_N = 4200 };

typedef struct net {
    mil_real *weight[NET_PARAMS], *x;
    mil_param param[NET_PARAMS];
    mil_node *out[NET_OUT];
    int count;
} net;

static void net_make(net *n)
{
    static const int64_t shapes[NET_PARAMS][2] = { { NET_E, NET_D }, { NET_E, 0 }, { NET_A, NET_E }, { NET_A, NET_E }, { NET_K, NET_A }, { NET_C, 4 * NET_E }, { NET_C, 0 },
                                                   { 4 * NET_E, 0 }, { 4 * NET_E, 0 }, { NET_E, NET_E } };
    memset(n, 0, sizeof *n);
    for (int i = 0; i < NET_PARAMS; i++) {
        const int64_t count = shapes[i][0] * (shapes[i][1] ? shapes[i][1] : 1);
        n->weight[i] = (mil_real *)malloc((size_t)count * sizeof(mil_real));
        fill(n->weight[i], count, (uint64_t)i + 1);
        for (int64_t k = 0; k < count; k++) n->weight[i][k] *= (mil_real)0.1;
        n->param[i] = param_make("w", n->weight[i], shapes[i][1] ? 2 : 1, shapes[i][0], shapes[i][1]);
    }
    n->x = (mil_real *)malloc(NET_MAX_N * NET_D * sizeof(mil_real));
    fill(n->x, NET_MAX_N * NET_D, 77);
}

static void net_free(net *n)
{
    for (int i = 0; i < NET_PARAMS; i++) free(n->weight[i]);
    free(n->x);
}

static void net_out(net *n, mil_node *value)
{
    mil_node_keep(value);
    n->out[n->count++] = value;
}

// x [B, N, D] -> logits, losses, gradients of all parameters
static void net_record(net *n, mil_tape *tape, int64_t B, int64_t N, int train)
{
    mil_node *p[NET_PARAMS];
    n->count = 0;
    mil_tape_training(tape, train);
    for (int i = 0; i < NET_PARAMS; i++) p[i] = mil_use(tape, &n->param[i]);
    mil_node *x = reals(tape, n->x, 3, B, N, NET_D);
    mil_node *h = mil_dropout(mil_relu(mil_linear(x, p[0], p[1])), 0.2, "embed");                // [B, N, E]
    mil_node *g = mil_linear(h, p[9], NULL);                                                     // its weight gradient has a large state
    mil_node *s = mil_linear(mil_mul(mil_tanh(mil_linear(h, p[2], NULL)), mil_sigmoid(mil_linear(h, p[3], NULL))), p[4], NULL);    // [B, N, K]
    mil_node *z = mil_softmax_pool(s, mil_add(g, h));                                            // [B, K, E]
    mil_node *attention = mil_softmax(s, 1);                                                     // [B, N, K]
    mil_node *again = mil_matmul_t(attention, h, 1, 0);                                          // [B, K, E]
    mil_node *top = mil_max(g, 1), *mean = mil_mean(mil_gelu(g), 1);                             // [B, 1, E]
    mil_node *centred = mil_sub(h, mean);                                                        // a second pass over the rows
    mil_node *spread = mil_logsumexp(centred, 1);
    mil_node *parts[4];
    parts[0] = mil_mean(z, 1);
    parts[1] = mil_mean(again, 1);
    parts[2] = top;
    parts[3] = spread;
    mil_node *all = mil_layer_norm(mil_concat(parts, 4, -1), p[7], p[8], 1e-5);                  // [B, 1, 4 E]
    mil_node *logits = mil_linear(all, p[5], p[6]);
    const int64_t flat[2] = { B, NET_C };
    logits = mil_reshape(logits, 2, flat);
    mil_node *loss = mil_affine(mil_sum_all(mil_mul(mil_log_softmax(logits, 1), mil_sigmoid(mil_detach(logits)))), -1, 0);
    net_out(n, logits);
    net_out(n, loss);
    net_out(n, attention);
    net_out(n, mil_argmax(s, 1));
    if (train) {
        mil_tape_backward(tape, loss);
        for (int i = 0; i < NET_PARAMS; i++) net_out(n, mil_node_grad(p[i]));
    }
}

typedef struct values { void *data[NET_OUT]; size_t bytes[NET_OUT]; int count; mil_status status; } values;

static values net_values(const net *n)
{
    values v;
    memset(&v, 0, sizeof v);
    v.count = n->count;
    for (int i = 0; i < n->count; i++) {
        v.bytes[i] = (size_t)n->out[i]->count * mil_dtype_size(n->out[i]->dtype);
        v.data[i] = malloc(v.bytes[i] + 1);
        if (!CHECK(mil_node_read(n->out[i], v.data[i], n->out[i]->count) == MIL_OK)) v.status = MIL_ERROR_STATE;
    }
    return v;
}

static values net_run(net *n, mil_context *ctx, int64_t B, int64_t N, int train, const mil_tape_option *option, int options)
{
    mil_tape *tape = tape_new(ctx);
    values v;
    memset(&v, 0, sizeof v);
    for (int i = 0; i < options; i++) mil_tape_set(tape, option[i], 1);
    mil_tape_seed(tape, 5, 9);
    net_record(n, tape, B, N, train);
    if (CHECK(mil_tape_run(tape) == MIL_OK)) v = net_values(n);
    else puts(mil_error(ctx));
    mil_tape_free(tape);
    return v;
}

static int values_equal(const values *a, const values *b)
{
    int same = a->count == b->count && a->count > 0;
    for (int i = 0; same && i < a->count; i++)
        if (a->bytes[i] != b->bytes[i] || memcmp(a->data[i], b->data[i], a->bytes[i]) != 0) { printf("result %d differs\n", i); same = 0; }
    return same;
}

static double values_distance(const values *a, const values *b)        // of the reals, relative to the largest of each result
{
    double worst = 0;
    for (int i = 0; i < a->count; i++) {
        const mil_real *x = (const mil_real *)a->data[i], *y = (const mil_real *)b->data[i];
        double size = 1e-3, err = 0;
        if (i == 3) continue;                              // indices
        for (size_t k = 0; k < a->bytes[i] / sizeof *x; k++) {
            if (fabs((double)x[k]) > size) size = fabs((double)x[k]);
            if (!(fabs((double)x[k] - (double)y[k]) <= err)) err = fabs((double)x[k] - (double)y[k]);
        }
        if (!(err / size <= worst)) worst = err / size;
    }
    return worst;
}

static void values_free(values *v) { for (int i = 0; i < v->count; i++) free(v->data[i]); }

static const int64_t net_sizes[][2] = { { 1, 1 }, { 1, 2 }, { 1, 127 }, { 1, 128 }, { 1, 129 }, { 2, 1 }, { 2, 150 }, { 1, 1000 }, { 1, 4095 }, { 1, 4096 }, { 1, 4097 }, { 3, 700 } };
static int net_size_count(void) { return check_small() ? 7 : COUNT(net_sizes); }

TEST(planned_memory_gives_the_bits_of_unshared_memory)
{
    static const mil_tape_option poison[] = { MIL_TAPE_POISON }, apart[] = { MIL_TAPE_NO_REUSE }, both[] = { MIL_TAPE_NO_REUSE, MIL_TAPE_POISON };
    net n;
    net_make(&n);
    mil_context *ctx = context_new(1);
    for (int k = 0; k < net_size_count(); k++)
        for (int train = 0; train < 2; train++) {
            values a = net_run(&n, ctx, net_sizes[k][0], net_sizes[k][1], train, NULL, 0);
            values b = net_run(&n, ctx, net_sizes[k][0], net_sizes[k][1], train, poison, 1);
            values c = net_run(&n, ctx, net_sizes[k][0], net_sizes[k][1], train, apart, 1);
            values d = net_run(&n, ctx, net_sizes[k][0], net_sizes[k][1], train, both, 2);
            CHECK(values_equal(&a, &b));
            CHECK(values_equal(&a, &c));
            CHECK(values_equal(&a, &d));
            values_free(&a); values_free(&b); values_free(&c); values_free(&d);
        }
    mil_context_free(ctx);
    net_free(&n);
}

TEST(node_by_node_agrees_with_row_groups)
{
    static const mil_tape_option apart[] = { MIL_TAPE_NO_GROUPS, MIL_TAPE_POISON };
    net n;
    net_make(&n);
    mil_context *ctx = context_new(1);
    for (int k = 0; k < net_size_count(); k++) {
        values a = net_run(&n, ctx, net_sizes[k][0], net_sizes[k][1], 1, NULL, 0), b = net_run(&n, ctx, net_sizes[k][0], net_sizes[k][1], 1, apart, 2);
        CHECK(values_distance(&a, &b) < (MIL_REAL_IS_FLOAT ? 1e-4 : 1e-12));         // tiles, and with them sums, may be cut otherwise
        values_free(&a); values_free(&b);
    }
    mil_context_free(ctx);
    net_free(&n);
}

// A host's threads, at their worst: last task first, and odd ones after even ones.
typedef struct host { int order; int64_t tasks; } host;
static void host_run(void *user, int64_t count, void (*task)(void *arg, int64_t index), void *arg)
{
    host *h = (host *)user;
    h->tasks += count;
    if (h->order == 0) for (int64_t i = count - 1; i >= 0; i--) task(arg, i);
    else {
        for (int64_t i = 0; i < count; i += 2) task(arg, i);
        for (int64_t i = 1; i < count; i += 2) task(arg, i);
    }
}

TEST(any_number_of_threads_gives_the_same_bits)
{
    static const int threads[] = { 2, 3, 5, 8 };
    net n;
    net_make(&n);
    for (int k = 3; k < net_size_count(); k++) {
        const int64_t B = net_sizes[k][0], N = net_sizes[k][1];
        mil_context *ctx = context_new(1);
        values one = net_run(&n, ctx, B, N, 1, NULL, 0);
        mil_context_free(ctx);
        for (int t = 0; t < COUNT(threads); t++) {
            ctx = context_new(threads[t]);
            values many = net_run(&n, ctx, B, N, 1, NULL, 0);
            CHECK(values_equal(&one, &many));
            values_free(&many);
            mil_context_free(ctx);
        }
        for (int order = 0; order < 2; order++) {
            mil_context_options options = mil_context_options_default();
            host h;
            h.order = order;
            h.tasks = 0;
            options.parallel.run = host_run;
            options.parallel.user = &h;
            options.parallel.threads = 4;
            CHECK(mil_context_create(&ctx, &options) == MIL_OK);
            values many = net_run(&n, ctx, B, N, 1, NULL, 0);
            CHECK(values_equal(&one, &many));
            CHECK(N < 129 || h.tasks > 0);
            values_free(&many);
            mil_context_free(ctx);
        }
        values_free(&one);
    }
    net_free(&n);
}

TEST(recomputing_in_the_backward_pass_gives_the_same_bits)
{
    static const mil_tape_option recompute[] = { MIL_TAPE_RECOMPUTE, MIL_TAPE_POISON };
    net n;
    net_make(&n);
    mil_context *ctx = context_new(2);
    for (int k = 0; k < net_size_count(); k++) {
        values a = net_run(&n, ctx, net_sizes[k][0], net_sizes[k][1], 1, NULL, 0), b = net_run(&n, ctx, net_sizes[k][0], net_sizes[k][1], 1, recompute, 2);
        CHECK(values_equal(&a, &b));
        values_free(&a); values_free(&b);
    }
    mil_context_free(ctx);
    net_free(&n);
}

// ---- memory ----
typedef struct counting { int64_t calls, fail_at, from_then_on, live; size_t bytes, largest; } counting;
static void *counting_reallocate(void *user, void *block, size_t old_size, size_t new_size)
{
    counting *c = (counting *)user;
    if (new_size == 0) {
        c->live -= block != NULL;
        c->bytes -= block ? old_size : 0;
        free(block);
        return NULL;
    }
    const int64_t call = c->calls++;
    if (c->fail_at >= 0 && (call == c->fail_at || (c->from_then_on && call > c->fail_at))) return NULL;
    void *p = realloc(block, new_size);
    if (!p) return NULL;
    c->live += block == NULL;
    c->bytes += new_size - (block ? old_size : 0);
    if (new_size > c->largest) c->largest = new_size;
    return p;
}

static mil_context *counting_context(counting *c)
{
    mil_context_options options = mil_context_options_default();
    mil_context *ctx = NULL;
    options.threads = 1;
    options.allocator.reallocate = counting_reallocate;
    options.allocator.user = c;
    mil_context_create(&ctx, &options);
    return ctx;
}

TEST(bytes_asked_for_are_the_bytes_then_allocated)
{
    net n;
    net_make(&n);
    for (int train = 0; train < 2; train++) {
        counting c;
        memset(&c, 0, sizeof c);
        c.fail_at = -1;
        mil_context *ctx = counting_context(&c);
        mil_tape *tape = tape_new(ctx);
        CHECK(mil_tape_bytes(tape) == 0);
        net_record(&n, tape, 1, 2000, train);
        const size_t bytes = mil_tape_bytes(tape);
        CHECK(bytes > 64 && mil_tape_bytes(tape) == bytes);
        c.largest = 0;
        CHECK(mil_tape_run(tape) == MIL_OK);
        CHECK(c.largest == bytes);                         // both count 64 for aligning
        CHECK(mil_tape_bytes(tape) == 0);                  // nothing new to run
        mil_tape_free(tape);
        mil_context_free(ctx);
        CHECK(c.live == 0 && c.bytes == 0);
    }
    net_free(&n);
}

// A tile holds many rows, but no more than there are.
TEST(a_tape_of_one_wide_row_needs_memory_for_that_row_only)
{
    enum { D = 4096 };
    static mil_real data[D];
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_node_keep(mil_tanh(mil_exp(mil_tanh(reals(tape, data, 2, 1, D, 0)))));
    const size_t bytes = mil_tape_bytes(tape);
    CHECK(bytes >= sizeof data && bytes < 12 * sizeof data);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(a_tape_larger_than_all_memory_is_refused)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    const int64_t huge = (int64_t)(SIZE_MAX / 16 / sizeof(mil_real) / 4);
    for (int i = 0; i < 100; i++) mil_node_keep(matrix(tape, huge, 1));
    CHECK(mil_tape_bytes(tape) == 0);
    CHECK_CONTAINS(mil_error(ctx), "more memory than has addresses");
    CHECK(mil_tape_run(tape) == MIL_ERROR_NO_MEMORY);
    mil_tape_reset(tape);
    if (sizeof(size_t) > 4) {                              // 2^56 numbers in a row: a tile of it wraps; 2^24 there may be room for
        mil_node_keep(mil_softmax(matrix(tape, 2, huge), 1));
        CHECK(mil_tape_run(tape) == MIL_ERROR_NO_MEMORY);
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// Two thousand values of all lives and sizes: nothing that lives shares memory, which poison and exact results show.
TEST(many_values_of_all_lives_share_memory_without_harm)
{
    enum { LIVE = 40, STEPS = 2000 };
    static const mil_tape_option poison[] = { MIL_TAPE_POISON, MIL_TAPE_NO_REUSE };
    mil_real result[2];
    size_t bytes[2];
    mil_context *ctx = context_new(1);
    for (int option = 0; option < 2; option++) {
        mil_tape *tape = tape_new(ctx);
        mil_node *live[LIVE];
        double expected[LIVE];
        uint64_t state = 1;
        mil_tape_set(tape, poison[option], 1);
        const mil_real one = 1;
        for (int i = 0; i < LIVE; i++) {
            live[i] = reals(tape, &one, 2, 1, 1, 0);
            expected[i] = 1;
        }
        for (int k = 0; k < STEPS; k++) {                  // a new value from two old ones, [n, 1] as wide as chance has it; whole, so that it is stored
            state = state * 6364136223846793005u + 1442695040888963407u;
            const int a = (int)(state >> 33) % LIVE, b = (int)(state >> 43) % LIVE, to = (int)(state >> 53) % LIVE;
            const int64_t n = 2 + (int64_t)((state >> 23) % 500), shape[2] = { n, 3 };
            mil_node *wide = mil_broadcast(mil_affine(mil_add(live[a], live[b]), 0.5, 1e-3 * (k % 7)), 2, shape);
            live[to] = mil_slice(mil_transpose(mil_transpose(wide)), 0, n - 1, 1);
            live[to] = mil_slice(live[to], 1, 2, 1);
            expected[to] = 0.5 * (expected[a] + expected[b]) + 1e-3 * (k % 7);
        }
        mil_node *sum = live[0];
        double total = expected[0];
        for (int i = 1; i < LIVE; i++) {
            sum = mil_add(sum, live[i]);
            total += expected[i];
        }
        mil_node_keep(sum);
        bytes[option] = mil_tape_bytes(tape);
        CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(sum, &result[option], 1) == MIL_OK);
        CHECK_NEAR(result[option], total, 1e-4);
        mil_tape_free(tape);
    }
    CHECK(result[0] == result[1]);
    CHECK(bytes[0] * 10 < bytes[1]);
    mil_context_free(ctx);
}

TEST(scoring_memory_does_not_grow_with_the_rows)
{
    net n;
    mil_real *x = (mil_real *)calloc(40000 * 4, sizeof *x);
    net_make(&n);
    mil_context *ctx = context_new(1);
    size_t bytes[2];
    for (int k = 0; k < 2; k++) {
        mil_tape *tape = tape_new(ctx);
        mil_node *h = mil_relu(reals(tape, x, 3, 1, k ? 40000 : 8000, 4)), *s = mil_sum(h, -1);
        mil_node_keep(mil_softmax_pool(mil_tanh(s), mil_exp(h)));
        bytes[k] = mil_tape_bytes(tape);
        mil_tape_free(tape);
    }
    CHECK(bytes[0] == bytes[1] && bytes[0] < 200000);
    mil_context_free(ctx);
    net_free(&n);
    free(x);
}

TEST(training_memory_does_not_grow_with_the_rows_when_recomputing)
{
    net n;
    net_make(&n);
    mil_context *ctx = context_new(1);
    size_t bytes[2][2];
    for (int recompute = 0; recompute < 2; recompute++)
        for (int k = 0; k < 2; k++) {
            mil_tape *tape = tape_new(ctx);
            const int64_t N = k ? 200000 : 50000;
            const mil_tensor t = mil_tensor_matrix(n.x, MIL_F16, N, NET_D);          // planned, not run
            mil_tape_set(tape, MIL_TAPE_RECOMPUTE, recompute);
            mil_tape_training(tape, 1);
            mil_node *h = mil_dropout(mil_relu(mil_linear(mil_input(tape, "x", &t), mil_use(tape, &n.param[0]), mil_use(tape, &n.param[1]))), 0.2, "d");
            mil_node *s = mil_linear(mil_tanh(mil_linear(h, mil_use(tape, &n.param[2]), NULL)), mil_use(tape, &n.param[4]), NULL);
            mil_node *z = mil_softmax_pool(s, h), *top = mil_max(h, 0);
            mil_tape_backward(tape, mil_add(mil_sum_all(mil_square(z)), mil_sum_all(mil_square(top))));
            for (int i = 0; i < 5; i++) mil_node_keep(mil_node_grad(mil_use(tape, &n.param[i])));
            bytes[recompute][k] = mil_tape_bytes(tape);
            mil_tape_free(tape);
        }
    CHECK(bytes[0][0] > (size_t)50000 * NET_E * sizeof(mil_real) && bytes[0][1] > 3 * bytes[0][0]);
    CHECK(bytes[1][0] == bytes[1][1] && bytes[1][0] < (size_t)40 << 20);
    CHECK(bytes[1][0] > 0);
    mil_context_free(ctx);
    net_free(&n);
}

TEST(converted_features_are_never_stored_whole)
{
    net n;
    net_make(&n);
    mil_context *ctx = context_new(1);
    size_t bytes[2];
    for (int half = 0; half < 2; half++) {
        mil_tape *tape = tape_new(ctx);
        const mil_tensor t = mil_tensor_matrix(n.x, half ? MIL_BF16 : MIL_REAL_DTYPE, 100000, NET_D);
        mil_tape_training(tape, 1);
        n.param[2].shape[1] = NET_D;                       // planned, not run
        n.param[2].count = NET_A * NET_D;
        mil_node *h = mil_tanh(mil_linear(mil_input(tape, "x", &t), mil_use(tape, &n.param[2]), NULL));
        mil_tape_backward(tape, mil_sum_all(mil_square(mil_softmax_pool(mil_slice(h, 1, 0, 1), h))));
        mil_node_keep(mil_node_grad(mil_use(tape, &n.param[2])));
        bytes[half] = mil_tape_bytes(tape);
        mil_tape_free(tape);
    }
    CHECK(bytes[0] > 0 && bytes[1] < bytes[0] + ((size_t)8 << 20));
    mil_context_free(ctx);
    net_free(&n);
}

TEST(the_callers_workspace_is_used_and_a_small_one_refused)
{
    net n;
    net_make(&n);
    counting c;
    memset(&c, 0, sizeof c);
    c.fail_at = -1;
    mil_context *ctx = counting_context(&c);
    values expected = net_run(&n, ctx, 1, 500, 1, NULL, 0);
    mil_tape *tape = tape_new(ctx);
    mil_tape_seed(tape, 5, 9);
    net_record(&n, tape, 1, 500, 1);
    const size_t bytes = mil_tape_bytes(tape);
    char *block = (char *)malloc(bytes + 3);
    memset(block + bytes, 0x5a, 3);
    mil_tape_workspace(tape, block, 1000);
    CHECK(mil_tape_run(tape) == MIL_ERROR_NO_MEMORY);
    CHECK_CONTAINS(mil_error(ctx), "the caller's workspace of 1000 bytes is too small");
    char *crooked = block + 65 - (uintptr_t)block % 64;    // one byte behind a multiple of 64: 63 are lost, and are told
    unsigned long long said = 0;
    mil_tape_workspace(tape, crooked, 1000);
    CHECK(mil_tape_run(tape) == MIL_ERROR_NO_MEMORY);
    const char *needed = strstr(mil_error(ctx), "small: ");
    CHECK(needed && sscanf(needed, "small: %llu", &said) == 1 && said + 64 == bytes + 63);
    mil_tape_workspace(tape, block, bytes);
    c.largest = 0;
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK(c.largest < bytes / 10);                         // nodes and lists, no workspace
    CHECK(block[bytes] == 0x5a && block[bytes + 1] == 0x5a && block[bytes + 2] == 0x5a);
    values got = net_values(&n);
    CHECK(values_equal(&expected, &got));
    values_free(&got);
    mil_tape_reset(tape);                                  // the block is free for the next recording
    mil_tape_seed(tape, 5, 9);
    net_record(&n, tape, 1, 500, 1);
    CHECK(mil_tape_run(tape) == MIL_OK);
    got = net_values(&n);
    CHECK(values_equal(&expected, &got));
    values_free(&got);
    values_free(&expected);
    mil_tape_free(tape);
    mil_context_free(ctx);
    CHECK(c.live == 0);
    free(block);
    net_free(&n);
}

TEST(everything_fits_into_one_fixed_block)
{
    net n;
    net_make(&n);
    mil_context *ctx = context_new(1);
    values expected = net_run(&n, ctx, 1, 300, 1, NULL, 0);
    mil_context_free(ctx);
    const size_t size = 32 << 20;
    char *block = (char *)malloc(size + 64);
    memset(block + size, 0x5a, 64);
    mil_context_options options = mil_context_options_default();
    options.memory = block + 1;                            // aligned by nobody
    options.memory_size = size - 1;
    options.threads = 1;
    CHECK(mil_context_create(&ctx, &options) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        values got = net_run(&n, ctx, 1, 300, 1, NULL, 0);
        CHECK(values_equal(&expected, &got));
        values_free(&got);
    }
    for (int k = 0; k < 64; k++) CHECK(block[size + (size_t)k] == 0x5a);
    mil_context_free(ctx);
    options.memory_size = 40000;
    CHECK(mil_context_create(&ctx, &options) == MIL_OK);
    mil_tape *tape = tape_new(ctx);
    net_record(&n, tape, 1, 300, 1);
    CHECK(mil_tape_run(tape) == MIL_ERROR_NO_MEMORY);
    mil_tape_free(tape);
    mil_context_free(ctx);
    values_free(&expected);
    free(block);
    net_free(&n);
}

TEST(every_failing_allocation_is_an_error_and_leaves_the_tape_usable)
{
    net n;
    net_make(&n);
    counting c;
    memset(&c, 0, sizeof c);
    c.fail_at = -1;
    mil_context *ctx = counting_context(&c);
    values expected = net_run(&n, ctx, 1, 200, 1, NULL, 0);
    mil_context_free(ctx);
    for (int from_then_on = 0; from_then_on < 2; from_then_on++) {
        int64_t failures = 0;
        for (int64_t k = 0; ; k++) {
            memset(&c, 0, sizeof c);
            c.fail_at = k;
            c.from_then_on = from_then_on;
            ctx = counting_context(&c);
            mil_tape *tape = NULL;
            mil_status status = ctx ? mil_tape_create(ctx, &tape) : MIL_ERROR_NO_MEMORY;
            if (status == MIL_OK) {
                mil_tape_seed(tape, 5, 9);
                net_record(&n, tape, 1, 200, 1);
                status = mil_tape_run(tape);
            }
            const int done = c.calls <= k;
            CHECK(status == (done ? MIL_OK : MIL_ERROR_NO_MEMORY));
            failures += status != MIL_OK;
            if (ctx && status != MIL_OK) CHECK_CONTAINS(mil_error(ctx), "no memory");
            c.fail_at = -1;
            if (ctx && tape) {                             // with memory back, the same tape records and runs
                mil_tape_reset(tape);
                mil_tape_seed(tape, 5, 9);
                net_record(&n, tape, 1, 200, 1);
                if (CHECK(mil_tape_run(tape) == MIL_OK)) {
                    values got = net_values(&n);
                    CHECK(values_equal(&expected, &got));
                    values_free(&got);
                }
            }
            mil_tape_free(tape);
            mil_context_free(ctx);
            CHECK(c.live == 0 && c.bytes == 0);
            if (done || k > 1000) break;
        }
        CHECK(failures > 8);
    }
    values_free(&expected);
    net_free(&n);
}

// The context holds the sentence of the call before; what is said here must be about memory.
TEST(memory_that_runs_out_while_recording_is_reported_as_that_whatever_failed_before)
{
    for (int draw = 0; draw < 2; draw++) {
        counting c;
        memset(&c, 0, sizeof c);
        c.fail_at = -1;
        mil_context *ctx = counting_context(&c);
        mil_tape *tape = tape_new(ctx);
        const int64_t shape = 1;
        mil_real value = 0;
        const mil_tensor t = mil_tensor_make(&value, MIL_REAL_DTYPE, 1, &shape);
        CHECK(!mil_create(ctx, "no such model", NULL) && mil_error_status(ctx) == MIL_ERROR_UNKNOWN);
        c.fail_at = c.calls;
        c.from_then_on = 1;
        for (int i = 0; i < 100000 && !mil_tape_error(tape)[0]; i++) {      // mil_tape_status would forget the old sentence
            if (draw) mil_tape_draw(tape, "mask", &t);
            else mil_constant(tape, 1, &shape, 1);
        }
        CHECK(mil_tape_status(tape) == MIL_ERROR_NO_MEMORY);
        CHECK_CONTAINS(mil_tape_error(tape), "no memory");
        CHECK(mil_tape_run(tape) == MIL_ERROR_NO_MEMORY);
        CHECK_CONTAINS(mil_error(ctx), "no memory");
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
}

TEST(a_tape_that_has_seen_its_shapes_allocates_nothing)
{
    net n;
    net_make(&n);
    counting c;
    memset(&c, 0, sizeof c);
    c.fail_at = -1;
    mil_context *ctx = counting_context(&c);
    mil_tape *tape = tape_new(ctx);
    for (int k = 0; k < 5; k++) {
        const int64_t before = c.calls;
        mil_tape_reset(tape);
        net_record(&n, tape, 1, 300, 1);
        CHECK(mil_tape_run(tape) == MIL_OK && mil_tape_rerun(tape) == MIL_OK);
        CHECK(k < 1 || c.calls == before);
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
    net_free(&n);
}

// ---- errors ----
TEST(errors_are_sticky_and_name_layer_op_and_shapes)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_tape_push(tape, "blocks.0");
    mil_tape_push(tape, "attn");
    mil_node *bad = mil_matmul(matrix(tape, 1000, 512), matrix(tape, 384, 256));
    CHECK(bad == NULL);
    CHECK(mil_tape_status(tape) == MIL_ERROR_SHAPE);
    CHECK(mil_relu(bad) == NULL && mil_add(matrix(tape, 2, 2), bad) == NULL);        // more errors change nothing
    mil_tape_pop(tape);
    mil_tape_pop(tape);
    CHECK(mil_sum(matrix(tape, 2, 2), 5) == NULL);
    CHECK(mil_tape_bytes(tape) == 0);
    CHECK(mil_tape_run(tape) == MIL_ERROR_SHAPE);
    CHECK_STRING(mil_error(ctx), "blocks.0.attn: matmul: [1000, 512] by [384, 256]: 512 and 384 differ");
    CHECK(mil_tape_rerun(tape) == MIL_ERROR_SHAPE);
    mil_tape_reset(tape);
    CHECK(mil_tape_status(tape) == MIL_OK);
    mil_node *ok = mil_relu(matrix(tape, 2, 2));
    mil_node_keep(ok);
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK_STRING(mil_error(ctx), "");
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(scopes_with_dots_are_popped_whole)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_tape_push(tape, "a.b");
    mil_tape_push(tape, "c.0.d");
    mil_tape_pop(tape);
    mil_tape_push(tape, "e");
    mil_sum(matrix(tape, 2, 3), 2);
    mil_tape_run(tape);
    CHECK_STRING(mil_error(ctx), "a.b.e: sum: axis 2 of [2, 3]");
    mil_tape_reset(tape);
    mil_tape_pop(tape);                                    // once too often: harmless
    for (int i = 0; i < 200; i++) mil_tape_push(tape, "deep");
    for (int i = 0; i < 199; i++) mil_tape_pop(tape);
    mil_sum(matrix(tape, 2, 3), -3);
    mil_tape_run(tape);
    CHECK_STRING(mil_error(ctx), "deep: sum: axis -3 of [2, 3]");
    mil_tape_free(tape);
    mil_context_free(ctx);
}

static mil_node *err_add(mil_tape *t) { return mil_add(matrix(t, 3, 4), matrix(t, 2, 4)); }
static mil_node *err_null(mil_tape *t) { return mil_mul(matrix(t, 3, 4), NULL); }
static mil_node *err_axis(mil_tape *t) { return mil_softmax(matrix(t, 3, 4), 2); }
static mil_node *err_empty_softmax(mil_tape *t) { return mil_softmax(matrix(t, 3, 0), 1); }
static mil_node *err_empty_softmax0(mil_tape *t) { return mil_softmax(matrix(t, 0, 3), 0); }
static mil_node *err_empty_max(mil_tape *t) { return mil_max(matrix(t, 0, 3), 0); }
static mil_node *err_empty_mean(mil_tape *t) { return mil_mean(matrix(t, 3, 0), -1); }
static mil_node *err_empty_argmax(mil_tape *t) { return mil_argmax(matrix(t, 3, 0), 1); }
static mil_node *err_empty_pool(mil_tape *t) { return mil_softmax_pool(matrix(t, 0, 1), matrix(t, 0, 2)); }
static mil_node *err_pool(mil_tape *t) { return mil_softmax_pool(matrix(t, 5, 1), matrix(t, 4, 2)); }
static mil_node *err_reshape(mil_tape *t) { const int64_t s[2] = { 5, -1 }; return mil_reshape(matrix(t, 3, 4), 2, s); }
static mil_node *err_reshape2(mil_tape *t) { const int64_t s[2] = { -1, -1 }; return mil_reshape(matrix(t, 3, 4), 2, s); }
static mil_node *err_permute(mil_tape *t) { const int a[2] = { 0, 0 }; return mil_permute(matrix(t, 3, 4), a); }
static mil_node *err_permute_beyond(mil_tape *t) { const int a[2] = { 0, 5 }; return mil_permute(matrix(t, 3, 4), a); }
static mil_node *err_permute_end(mil_tape *t) { const int a[2] = { 0, 2 }; return mil_permute(matrix(t, 3, 4), a); }
static mil_node *err_permute_negative(mil_tape *t) { const int a[2] = { -1, 0 }; return mil_permute(matrix(t, 3, 4), a); }
static mil_node *err_transpose(mil_tape *t) { return mil_transpose(mil_constant(t, 0, NULL, 1)); }
static mil_node *err_concat(mil_tape *t) { mil_node *x[2]; x[0] = matrix(t, 3, 4); x[1] = matrix(t, 3, 5); return mil_concat(x, 2, 0); }
static mil_node *err_concat_null(mil_tape *t) { mil_node *x[2]; x[0] = matrix(t, 3, 4); x[1] = NULL; return mil_concat(x, 2, 0); }
static mil_node *err_slice(mil_tape *t) { return mil_slice(matrix(t, 3, 4), 1, 2, 3); }
static mil_node *err_slice_huge(mil_tape *t) { return mil_slice(matrix(t, 3, 4), 1, INT64_MAX, INT64_MAX); }
static mil_node *err_pad(mil_tape *t) { return mil_pad(matrix(t, 3, 4), 0, -1, 0); }
static mil_node *err_broadcast(mil_tape *t) { const int64_t s[2] = { 3, 5 }; return mil_broadcast(matrix(t, 3, 4), 2, s); }
static mil_node *err_sum_to(mil_tape *t) { const int64_t s[2] = { 2, 4 }; return mil_sum_to(matrix(t, 3, 4), 2, s); }
static mil_node *err_linear(mil_tape *t) { return mil_linear(matrix(t, 3, 4), matrix(t, 2, 5), NULL); }
static mil_node *err_bias(mil_tape *t) { return mil_linear(matrix(t, 3, 4), matrix(t, 2, 4), matrix(t, 1, 3)); }
static mil_node *err_norm(mil_tape *t) { return mil_layer_norm(matrix(t, 3, 4), matrix(t, 1, 4), matrix(t, 1, 3), 1e-5); }
static mil_node *err_norm_half(mil_tape *t) { return mil_layer_norm(matrix(t, 3, 4), matrix(t, 1, 4), NULL, 1e-5); }
static mil_node *err_index(mil_tape *t) { return mil_gather(matrix(t, 3, 4), matrix(t, 1, 4), 0); }
static mil_node *err_real(mil_tape *t) { return mil_relu(mil_argmax(matrix(t, 3, 4), 0)); }
static mil_node *err_scatter(mil_tape *t) { return mil_scatter_add(matrix(t, 3, 4), mil_argmax(matrix(t, 3, 4), 0), 0, 5); }
static mil_node *err_classes(mil_tape *t) { return mil_one_hot(mil_argmax(matrix(t, 3, 4), 0), 0); }
static mil_node *err_rate(mil_tape *t) { mil_tape_training(t, 1); return mil_dropout(matrix(t, 3, 4), 1, "d"); }
static mil_node *err_name(mil_tape *t) { const int64_t s = 3; return mil_random_uniform(t, NULL, 1, &s); }
static mil_node *err_mask(mil_tape *t) { return mil_mask_fill(matrix(t, 1, 4), matrix(t, 3, 4), 0); }
static mil_node *err_batches(mil_tape *t) { const int64_t a[3] = { 2, 3, 4 }, b[3] = { 3, 4, 5 }; return mil_matmul(mil_constant(t, 3, a, 1), mil_constant(t, 3, b, 1)); }
static mil_node *err_rank(mil_tape *t) { const int64_t s[9] = { 1, 1, 1, 1, 1, 1, 1, 1, 1 }; return mil_constant(t, 9, s, 1); }
static mil_node *err_huge(mil_tape *t) { return matrix(t, INT64_MAX / 4, 1000); }
static mil_node *err_concat_one(mil_tape *t) { mil_node *x = matrix(t, 3, 4); return mil_concat(&x, 1, 99); }
static mil_node *err_mask_rank(mil_tape *t) { const int64_t n = 3; return mil_mask_fill(mil_constant(t, 1, &n, 1), matrix(t, 1, 3), 0); }
static mil_node *err_linear_stack(mil_tape *t) { const int64_t s[3] = { 2, 3, 4 }; return mil_linear(matrix(t, 1, 4), mil_constant(t, 3, s, 1), NULL); }
static mil_node *err_linear_line(mil_tape *t) { const int64_t n = 4; return mil_linear(matrix(t, 1, 4), mil_constant(t, 1, &n, 1), NULL); }
static mil_node *err_scatter_rank(mil_tape *t)
{
    static const int64_t index[4] = { 0, 1, 2, 0 };
    const mil_tensor i = mil_tensor_matrix(index, MIL_I64, 2, 2);
    return mil_scatter_add(matrix(t, 4, 3), mil_input(t, "index", &i), 0, 3);
}
static mil_node *err_reshape_huge(mil_tape *t)             // the product of eight such lengths fits no integer
{
    int64_t s[8];
    for (int a = 0; a < 8; a++) s[a] = 1000000000000000000;
    return mil_reshape(matrix(t, 2, 2), 8, s);
}
static mil_node *err_reshape_empty(mil_tape *t) { const int64_t s[3] = { INT64_MAX, INT64_MAX, -1 }; return mil_reshape(matrix(t, 0, 2), 3, s); }
static mil_node *err_pad_huge(mil_tape *t) { return mil_pad(matrix(t, 3, 4), 0, INT64_MAX, INT64_MAX); }
static mil_node *tokens(mil_tape *t, int64_t n, int64_t c) { const int64_t s[3] = { 1, n, c }; return mil_constant(t, 3, s, 1); }
static mil_node *err_run_mean(mil_tape *t) { return mil_run_mean(tokens(t, 4, 2), 2, INT64_MAX); }
static mil_node *err_tokens(mil_tape *t, int64_t skip, int64_t width)
{
    const int64_t s[4] = { 2, 1, 3, 3 };
    return mil_conv_tokens(tokens(t, 4, 2), mil_constant(t, 4, s, 1), NULL, skip, width);
}
static mil_node *err_tokens_before(mil_tape *t) { return err_tokens(t, -2, 2); }
static mil_node *err_tokens_beyond(mil_tape *t) { return err_tokens(t, 6, 2); }
static mil_node *err_tokens_width(mil_tape *t) { return err_tokens(t, 0, 0); }
static mil_node *err_tokens_rest(mil_tape *t) { return err_tokens(t, 1, 2); }
static mil_node *err_conv_after(mil_tape *t) { return mil_conv_rows(tokens(t, 4, 2), matrix(t, 2, 3), NULL, INT64_MAX); }
static mil_node *err_conv_before(mil_tape *t) { return mil_conv_rows(tokens(t, 4, 2), matrix(t, 2, 3), NULL, INT64_MIN); }
static mil_node *err_regions(mil_tape *t) { return mil_regions_join(tokens(t, 1, 2), 1, (int64_t)1 << 32, 1, 1); }             // a side squared that is 2^64
static mil_node *err_regions_bags(mil_tape *t) { return mil_regions_join(tokens(t, 1, 2), INT64_MAX, 2, 1, 4); }
static mil_node *err_regions_side(mil_tape *t) { return mil_regions_join(tokens(t, 1, 2), 1, INT64_MIN, 1, 1); }
static mil_node *err_product(mil_tape *t)
{
    const int64_t n = sizeof(size_t) > 4 ? 3000000000 : 30000000;
    return mil_mul(matrix(t, n, 1), matrix(t, 1, n));
}

TEST(each_wrong_call_has_its_sentence)
{
    static const struct { mil_node *(*record)(mil_tape *t); mil_status status; const char *text; } wrong[] = {
        { err_add, MIL_ERROR_SHAPE, "add: [3, 4] and [2, 4] do not broadcast" },
        { err_null, MIL_ERROR_ARGUMENT, "mul: an input is NULL" },
        { err_axis, MIL_ERROR_SHAPE, "softmax: axis 2 of [3, 4]" },
        { err_empty_softmax, MIL_ERROR_SHAPE, "softmax: [3, 0] has an empty axis" },
        { err_empty_softmax0, MIL_ERROR_SHAPE, "axis 0 of [0, 3] is empty" },
        { err_empty_max, MIL_ERROR_SHAPE, "max: axis 0 of [0, 3] is empty" },
        { err_empty_mean, MIL_ERROR_SHAPE, "mean: axis 1 of [3, 0] is empty" },
        { err_empty_argmax, MIL_ERROR_SHAPE, "argmax: axis 1 of [3, 0] is empty" },
        { err_empty_pool, MIL_ERROR_SHAPE, "softmax_pool: scores [0, 1] and values [0, 2] need the same instances, at least one" },
        { err_pool, MIL_ERROR_SHAPE, "softmax_pool: scores [5, 1] and values [4, 2]" },
        { err_reshape, MIL_ERROR_SHAPE, "reshape: [3, 4] to [5, -1]" },
        { err_reshape2, MIL_ERROR_SHAPE, "reshape: [3, 4] to [-1, -1]" },
        { err_permute, MIL_ERROR_ARGUMENT, "permute: axis 0 of [3, 4] is not a permutation" },
        { err_permute_beyond, MIL_ERROR_ARGUMENT, "permute: axis 5 of [3, 4] is not a permutation" },
        { err_permute_end, MIL_ERROR_ARGUMENT, "permute: axis 2 of [3, 4] is not a permutation" },
        { err_permute_negative, MIL_ERROR_ARGUMENT, "permute: axis -1 of [3, 4] is not a permutation" },
        { err_transpose, MIL_ERROR_SHAPE, "transpose: needs two axes, got []" },
        { err_concat, MIL_ERROR_SHAPE, "concat: [3, 4] and [3, 5] along axis 0" },
        { err_concat_null, MIL_ERROR_ARGUMENT, "concat: an input is NULL" },
        { err_slice, MIL_ERROR_SHAPE, "slice: 3 from 2 on of axis 1 of [3, 4]" },
        { err_slice_huge, MIL_ERROR_SHAPE, "slice: 9223372036854775807 from 9223372036854775807 on" },
        { err_pad, MIL_ERROR_SHAPE, "pad: -1 and 0 zeros" },
        { err_broadcast, MIL_ERROR_SHAPE, "broadcast: [3, 4] to [3, 5]" },
        { err_sum_to, MIL_ERROR_SHAPE, "sum_to: [3, 4] to [2, 4]" },
        { err_linear, MIL_ERROR_SHAPE, "linear: x [3, 4] by weight [2, 5]: 4 and 5 differ" },
        { err_bias, MIL_ERROR_SHAPE, "linear: weight [2, 4] and bias [1, 3] do not fit" },
        { err_norm, MIL_ERROR_SHAPE, "layer_norm: x [3, 4], weight [1, 4], bias [1, 3]" },
        { err_norm_half, MIL_ERROR_ARGUMENT, "layer_norm: an input is NULL" },
        { err_index, MIL_ERROR_ARGUMENT, "where I64 is needed" },
        { err_real, MIL_ERROR_ARGUMENT, "argmax [1, 4] holds I64 where" },
        { err_scatter, MIL_ERROR_SHAPE, "scatter_add: axis 0 of [3, 4] by index [1, 4] to length 5" },
        { err_classes, MIL_ERROR_SHAPE, "one_hot: [1, 4] to 0 classes" },
        { err_rate, MIL_ERROR_ARGUMENT, "dropout: the rate 1 is not in [0, 1)" },
        { err_name, MIL_ERROR_ARGUMENT, "a draw needs a name" },
        { err_mask, MIL_ERROR_SHAPE, "mask_fill: the mask [3, 4] does not broadcast to [1, 4]" },
        { err_batches, MIL_ERROR_SHAPE, "matmul: [2, 3, 4] by [3, 4, 5]: leading axes do not broadcast" },
        { err_rank, MIL_ERROR_SHAPE, "constant: rank 9, the most is 8" },
        { err_huge, MIL_ERROR_SHAPE, "is negative or too large" },
        { err_concat_one, MIL_ERROR_SHAPE, "concat: axis 99 of [3, 4]" },
        { err_mask_rank, MIL_ERROR_SHAPE, "mask_fill: the mask [1, 3] does not broadcast to [3]" },
        { err_linear_stack, MIL_ERROR_SHAPE, "linear: the weight [2, 3, 4] is more than one matrix" },
        { err_linear_line, MIL_ERROR_SHAPE, "linear: the weight [4] is not [out, in]" },
        { err_scatter_rank, MIL_ERROR_SHAPE, "scatter_add: axis 0 of [4, 3] by index [2, 2] to length 3" },
        { err_reshape_huge, MIL_ERROR_SHAPE, "reshape: [2, 2] to [1000000000000000000, 1000000000000000000" },
        { err_reshape_empty, MIL_ERROR_SHAPE, "reshape: [0, 2] to [9223372036854775807, 9223372036854775807, -1]" },
        { err_pad_huge, MIL_ERROR_SHAPE, "pad: 9223372036854775807 and 9223372036854775807 zeros: negative or too many" },
        { err_run_mean, MIL_ERROR_SHAPE, "run_mean: 2 runs of [1, 4, 2] after 9223372036854775807 zeros" },
        { err_tokens_before, MIL_ERROR_SHAPE, "conv_tokens: " },
        { err_tokens_beyond, MIL_ERROR_SHAPE, "conv_tokens: " },
        { err_tokens_width, MIL_ERROR_SHAPE, "conv_tokens: " },
        { err_tokens_rest, MIL_ERROR_SHAPE, "conv_tokens: " },
        { err_conv_after, MIL_ERROR_SHAPE, "conv_rows: 9223372036854775807 taps before" },
        { err_conv_before, MIL_ERROR_SHAPE, "conv_rows: -9223372036854775808 taps before" },
        { err_regions, MIL_ERROR_SHAPE, "regions: [1, 1, 2] back to 1 bags on a side of 4294967296" },
        { err_regions_bags, MIL_ERROR_SHAPE, "regions: [1, 1, 2] back to 9223372036854775807 bags on a side of 2" },
        { err_regions_side, MIL_ERROR_SHAPE, "regions: [1, 1, 2] back to 1 bags on a side of -9223372036854775808" },
        { err_product, MIL_ERROR_SHAPE, sizeof(size_t) > 4 ? "mul: shape [3000000000, 3000000000] is negative or too large" : "mul: shape [30000000, 30000000] is negative or too large" },
    };
    mil_context *ctx = context_new(1);
    for (int i = 0; i < COUNT(wrong); i++) {
        mil_tape *tape = tape_new(ctx);
        CHECK(wrong[i].record(tape) == NULL);
        if (!CHECK(mil_tape_run(tape) == wrong[i].status)) printf("  case %d: %s\n", i, wrong[i].text);
        CHECK_CONTAINS(mil_error(ctx), wrong[i].text);
        mil_tape_free(tape);
    }
    mil_context_free(ctx);
}

TEST(null_arguments_are_no_crash)
{
    mil_tape *tape = NULL;
    mil_context *ctx = context_new(1);
    CHECK(mil_tape_create(NULL, &tape) == MIL_ERROR_ARGUMENT && mil_tape_create(ctx, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_tape_run(NULL) == MIL_ERROR_ARGUMENT && mil_tape_rerun(NULL) == MIL_ERROR_ARGUMENT && mil_tape_bytes(NULL) == 0);
    CHECK(mil_relu(NULL) == NULL && mil_add(NULL, NULL) == NULL && mil_sum_all(NULL) == NULL && mil_softmax_pool(NULL, NULL) == NULL);
    mil_node *nothing = NULL;
    CHECK(mil_concat(NULL, 2, 0) == NULL && mil_concat(&nothing, 1, 0) == NULL && mil_concat(&nothing, 0, 0) == NULL);
    CHECK(mil_node_read(NULL, NULL, 0) == MIL_ERROR_ARGUMENT && mil_node_grad(NULL) == NULL);
    mil_node_keep(NULL);
    mil_node_want_grad(NULL);
    mil_tape_free(NULL);
    mil_tape_reset(NULL);
    mil_update(NULL, NULL);
    tape = tape_new(ctx);
    CHECK(mil_tape_rerun(tape) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(ctx), "nothing has run yet");
    CHECK(mil_tape_run(tape) == MIL_OK);                   // nothing recorded is nothing to do
    CHECK(mil_input(tape, "features", NULL) == NULL);
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "features: no tensor");
    mil_tape_reset(tape);
    mil_tensor t = mil_tensor_matrix(NULL, MIL_F32, 2, 2);
    CHECK(mil_input(tape, "features", &t) == NULL);
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "features: the tensor's data is NULL");
    mil_tape_reset(tape);
    CHECK(mil_use(tape, NULL) == NULL);
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// 32 and 33 must not be taken for 0 and 1, which ask for more memory and for other bytes in it.
TEST(an_option_that_does_not_exist_is_ignored)
{
    static const int numbers[] = { 77, 32, 33, -1, MIL_TAPE_RECOMPUTE + 1 };
    size_t bytes[2];
    mil_context *ctx = context_new(1);
    for (int way = 0; way < 2; way++) {
        mil_tape *tape = tape_new(ctx);
        for (int i = 0; i < COUNT(numbers) && way; i++) mil_tape_set(tape, (mil_tape_option)numbers[i], 1);
        mil_node *y = mil_transpose(matrix(tape, 200, 30));
        for (int i = 0; i < 6; i++) y = mil_transpose(mil_sqrt(y));
        mil_node_keep(y = mil_sum_all(y));
        bytes[way] = mil_tape_bytes(tape);
        CHECK(mil_tape_run(tape) == MIL_OK);
        CHECK_NEAR(read_one(y), 6000, 1e-6);
        mil_tape_free(tape);
    }
    CHECK(bytes[0] > 0 && bytes[1] == bytes[0]);
    mil_context_free(ctx);
}

TEST(an_input_without_elements_needs_no_data)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    const mil_tensor t = mil_tensor_matrix(NULL, MIL_REAL_DTYPE, 0, 4);
    mil_node *x = mil_input(tape, "x", &t), *y = mil_sum_all(x);
    mil_node_keep(y);
    CHECK(x && mil_tape_run(tape) == MIL_OK);
    CHECK(mil_input_set(x, NULL) == MIL_OK);
    CHECK_STRING(mil_error(ctx), "");
    CHECK(mil_tape_rerun(tape) == MIL_OK);
    CHECK_NEAR(read_one(y), 0, 0);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// ---- stages, reruns, updates ----
TEST(a_tape_runs_in_stages)
{
    static const mil_real data[6] = { 1, -2, 3, -4, 5, -6 };
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_real v[6];
    mil_node *x = reals(tape, data, 2, 2, 3, 0);
    const int64_t flat = 6, shape[2] = { 2, 3 };
    mil_node *view = mil_reshape(x, 1, &flat);             // a view of an input, first needed in the second run
    mil_node *a = mil_relu(x), *lost = mil_square(a);
    mil_node_keep(a);
    mil_node *total = mil_sum_all(lost);
    mil_node_keep(total);
    CHECK(mil_node_read(a, v, 6) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(ctx), "has not run");
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK_NEAR(read_one(total), 35, 0);
    mil_node *b = mil_add(mil_exp(a), mil_reshape(view, 2, shape));
    mil_node_keep(b);
    CHECK(mil_node_read(b, v, 6) == MIL_ERROR_STATE);
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK(mil_node_read(b, v, 6) == MIL_OK);
    for (int i = 0; i < 6; i++) CHECK_NEAR(v[i], exp(data[i] > 0 ? (double)data[i] : 0) + (double)data[i], 1e-5);
    CHECK(mil_node_read(a, v, 6) == MIL_OK && v[0] == 1 && v[1] == 0);
    CHECK(mil_node_read(a, v, 5) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "relu [2, 3] has 6 elements, not 5");
    mil_node_keep(lost);                                   // too late
    CHECK(mil_node_read(lost, v, 6) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(ctx), "square [2, 3] was not kept");
    mil_node_keep(mil_exp(lost));
    CHECK(mil_tape_run(tape) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(ctx), "square [2, 3]: of an earlier run and not kept");
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// 0 bytes need a reason, or they look like nothing to do.
TEST(bytes_of_a_tape_that_needs_a_lost_value_are_0_and_the_error_says_why)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    CHECK(mil_tape_bytes(tape) == 0 && mil_error_status(ctx) == MIL_OK);
    mil_node *lost = mil_exp(matrix(tape, 2, 3)), *y = mil_exp(lost);
    mil_node_keep(y);
    CHECK(mil_tape_run(tape) == MIL_OK && mil_tape_bytes(tape) == 0 && mil_error_status(ctx) == MIL_OK);
    mil_node_keep(mil_square(lost));
    CHECK(mil_tape_bytes(tape) == 0 && mil_error_status(ctx) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(ctx), "exp [2, 3]: of an earlier run and not kept");
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(an_update_of_a_lost_value_is_an_error)
{
    mil_real w[4] = { 1, 2, 3, 4 };
    mil_param p = param_make("w", w, 2, 2, 2);
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_node *y = mil_square(mil_use(tape, &p)), *z = mil_exp(y);
    mil_node_keep(z);
    CHECK(mil_tape_run(tape) == MIL_OK);
    mil_update(&p, y);
    CHECK(mil_tape_run(tape) == MIL_ERROR_STATE);
    CHECK(w[3] == 4);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(what_was_kept_has_its_gradient_after_the_run)
{
    mil_real data[12], all_at_once[12], later[12];
    for (int i = 0; i < 12; i++) data[i] = (mil_real)(i * 5 % 7) / 4;
    mil_context *ctx = context_new(1);
    for (int way = 0; way < 3; way++) {                    // at once; after a run; after a run that kept a view in place of the value
        mil_tape *tape = tape_new(ctx);
        mil_tape_training(tape, 1);
        mil_node *x = reals(tape, data, 2, 4, 3, 0);
        mil_node_want_grad(x);
        mil_node *y = mil_layer_norm(x, NULL, NULL, 1e-5), *top = mil_max(y, 0), *seen = mil_squeeze(top, 0), *loss = mil_sum_all(mil_square(seen)), *squares = loss->input[0];
        mil_node_keep(y);
        mil_node_keep(way == 2 ? seen : top);
        mil_node_keep(squares);
        mil_node_keep(loss);
        const size_t bytes = mil_tape_bytes(tape);
        CHECK(bytes > 0 && mil_tape_bytes(tape) == bytes);
        if (way) CHECK(mil_tape_run(tape) == MIL_OK);
        CHECK(mil_tape_backward(tape, loss) == MIL_OK);
        mil_node *g = mil_node_grad(x);
        mil_node_keep(g);
        if (!CHECK(mil_tape_run(tape) == MIL_OK)) puts(mil_error(ctx));
        else CHECK(mil_node_read(g, way ? later : all_at_once, 12) == MIL_OK);
        mil_tape_free(tape);
        double size = 0;
        for (int i = 0; way && i < 12; i++) {
            CHECK_NEAR(later[i], all_at_once[i], MIL_REAL_IS_FLOAT ? 1e-6 : 1e-12);
            size += fabs((double)later[i]);
            later[i] = 0;
        }
        CHECK(!way || size > 0.1);
    }
    mil_context_free(ctx);
}

TEST(a_rerun_sees_new_inputs_parameters_seeds_and_runs_updates)
{
    mil_real data[4] = { 1, 2, 3, 4 }, other[4] = { 10, 20, 30, 40 }, w[4] = { 1, 1, 1, 1 }, v[4];
    mil_param p = param_make("w", w, 2, 2, 2);
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_node *x = reals(tape, data, 2, 2, 2, 0), *y = mil_mul(x, mil_use(tape, &p)), *s = mil_sum_all(y);
    const int64_t shape = 3;
    mil_node *draw = mil_random_uniform(tape, "u", 1, &shape);
    mil_node_keep(s);
    mil_node_keep(draw);
    mil_update(&p, mil_affine(mil_use(tape, &p), 2, 0));
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK_NEAR(read_one(s), 10, 0);                        // updates come after everything else
    CHECK(w[0] == 2 && w[3] == 2 && p.version == 1);
    mil_real first[3], second[3];
    CHECK(mil_node_read(draw, first, 3) == MIL_OK);
    CHECK(mil_input_set(x, other) == MIL_OK);
    mil_tape_seed(tape, 0, 1);
    CHECK(mil_tape_rerun(tape) == MIL_OK);
    CHECK_NEAR(read_one(s), 200, 0);
    CHECK(w[0] == 4);
    CHECK(mil_node_read(draw, second, 3) == MIL_OK && memcmp(first, second, sizeof first) != 0);
    mil_tape_seed(tape, 0, 0);
    CHECK(mil_tape_rerun(tape) == MIL_OK);
    CHECK(mil_node_read(draw, second, 3) == MIL_OK && memcmp(first, second, sizeof first) == 0);
    mil_node *later = mil_affine(s, 1, 1);                 // a second stage is run again, too
    mil_node_keep(later);
    CHECK(mil_tape_run(tape) == MIL_OK && mil_tape_rerun(tape) == MIL_OK);
    CHECK_NEAR(read_one(later), 100 * 8 + 1, 0);
    CHECK(w[0] == 16);
    CHECK(mil_input_set(x, NULL) == MIL_ERROR_ARGUMENT && mil_input_set(s, data) == MIL_ERROR_ARGUMENT);
    CHECK(mil_input_set(x, (const char *)other + 1) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "less aligned than before");
    CHECK(mil_node_read(x, v, 4) == MIL_OK && v[1] == 20);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(two_parameters_can_swap)
{
    mil_real a[2] = { 1, 2 }, b[2] = { 3, 4 };
    mil_param pa = param_make("a", a, 1, 2, 0), pb = param_make("b", b, 1, 2, 0);
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_update(&pa, mil_use(tape, &pb));
    mil_update(&pb, mil_use(tape, &pa));
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK(a[0] == 3 && a[1] == 4 && b[0] == 1 && b[1] == 2);
    mil_tape_reset(tape);
    mil_update(&pa, mil_constant(tape, 0, NULL, 1));
    CHECK(mil_tape_run(tape) == MIL_ERROR_SHAPE);
    CHECK_CONTAINS(mil_error(ctx), "mil_update: a [2] cannot take a value []");
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// Converted on the way, as with every op.
TEST(a_parameter_is_updated_from_an_input_of_any_dtype_and_stride)
{
    mil_real w[6] = { 0, 0, 0, 0, 0, 0 };
    double wide[12];
    float narrow[12];
    int64_t labels[3] = { 1, 1, 1 };
    int32_t others[3] = { 7, 8, 9 };
    for (int i = 0; i < 12; i++) { wide[i] = i + 0.5; narrow[i] = (float)i; }
    mil_param p = param_make("w", w, 2, 2, 3), buffer = param_make("labels", NULL, 1, 3, 0);
    buffer.dtype = MIL_I64;
    buffer.data = labels;
    buffer.trainable = 0;
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_tensor t = mil_tensor_matrix(wide, MIL_F64, 2, 3);
    mil_update(&p, mil_input(tape, "x", &t));
    CHECK(mil_tape_run(tape) == MIL_OK);
    for (int i = 0; i < 6; i++) CHECK(w[i] == (mil_real)(i + 0.5));
    mil_tape_reset(tape);
    t = mil_tensor_matrix(narrow, MIL_F32, 2, 3);
    t.stride[0] = 6 * 4;                                   // every other column of [2, 6]
    t.stride[1] = 2 * 4;
    mil_update(&p, mil_input(tape, "x", &t));
    CHECK(mil_tape_run(tape) == MIL_OK);
    for (int i = 0; i < 6; i++) CHECK(w[i] == (mil_real)(2 * i));
    mil_tape_reset(tape);
    t = mil_tensor_make(others, MIL_I32, 1, p.shape + 1);
    mil_update(&buffer, mil_input(tape, "x", &t));
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK(labels[0] == 7 && labels[1] == 8 && labels[2] == 9);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(updates_that_cannot_be_are_refused)
{
    int64_t a[2] = { 1, 2 }, b[2] = { 3, 4 };
    mil_real w[2] = { 5, 6 };
    mil_param pa = param_make("a", NULL, 1, 2, 0), pb = param_make("b", NULL, 1, 2, 0), pw = param_make("w", w, 1, 2, 0);
    pa.dtype = pb.dtype = MIL_I64;
    pa.data = a;
    pb.data = b;
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_update(NULL, matrix(tape, 1, 2));
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "mil_update: param is NULL");
    mil_tape_reset(tape);
    mil_update(&pa, mil_use(tape, &pb));                   // no op copies integers, and a swap without a copy would lose one
    mil_update(&pb, mil_use(tape, &pa));
    CHECK(mil_tape_run(tape) == MIL_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(mil_error(ctx), "mil_update: a from another parameter of I64");
    CHECK(a[0] == 1 && a[1] == 2 && b[0] == 3 && b[1] == 4);
    mil_tape_reset(tape);
    mil_update(&pw, mil_use(tape, &pa));
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT && w[0] == 5);
    mil_tape_reset(tape);
    mil_update(&pa, mil_use(tape, &pw));
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT && a[0] == 1);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// ---- draws ----
TEST(draws_are_named_numbered_and_can_be_supplied)
{
    const mil_real mask0[6] = { 1, 0, 1, 1, 0, 1 }, mask1[6] = { 0, 0, 0, 1, 1, 1 };
    mil_real v[6], data[6] = { 1, 2, 3, 4, 5, 6 };
    const int64_t shape[2] = { 2, 3 };
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_tensor t0 = mil_tensor_make(mask0, MIL_REAL_DTYPE, 2, shape), t1 = mil_tensor_make(mask1, MIL_REAL_DTYPE, 2, shape);
    mil_tape_draw(tape, "mask", &t0);
    mil_tape_draw(tape, "mask.1", &t1);
    mil_tape_training(tape, 1);
    mil_node *x = reals(tape, data, 2, 2, 3, 0), *a = mil_dropout(x, 0.5, "mask"), *b = mil_dropout(x, 0.5, "mask"), *c = mil_dropout(x, 0.5, "mask");
    mil_node_keep(a);
    mil_node_keep(b);
    mil_node_keep(c);
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK(mil_node_read(a, v, 6) == MIL_OK);
    for (int i = 0; i < 6; i++) CHECK(v[i] == 2 * data[i] * mask0[i]);
    CHECK(mil_node_read(b, v, 6) == MIL_OK);
    for (int i = 0; i < 6; i++) CHECK(v[i] == 2 * data[i] * mask1[i]);
    CHECK(mil_node_read(c, v, 6) == MIL_OK);
    for (int i = 0; i < 6; i++) CHECK(v[i] == 0 || v[i] == 2 * data[i]);
    mil_tape_reset(tape);                                  // draws are forgotten, too
    mil_tape_training(tape, 0);
    x = reals(tape, data, 2, 2, 3, 0);
    CHECK(mil_dropout(x, 0.5, "mask") == x);
    const int64_t other[2] = { 2, 4 };
    mil_tape_draw(tape, "u", &t0);
    CHECK(mil_random_uniform(tape, "u", 2, other) == NULL);
    CHECK(mil_tape_run(tape) == MIL_ERROR_SHAPE);
    CHECK_CONTAINS(mil_error(ctx), "draw u: 6 values where [2, 4] are drawn");
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// "a" drawn twice takes the name "a.1"; who asks for "a.1" itself must not get the same numbers.
TEST(two_draws_never_share_values_whatever_their_names)
{
    static const char *const names[][5] = { { "a", "a", "a.1", "a", "a.1" }, { "a.1", "a", "a", "a.1", "a.1.1" }, { "a.2", "a", "a", "a", "a.1" } };
    mil_context *ctx = context_new(1);
    const int64_t shape = 3;
    for (int k = 0; k < COUNT(names); k++) {
        mil_tape *tape = tape_new(ctx);
        mil_node *draw[5];
        mil_real v[5][3];
        for (int i = 0; i < 5; i++) mil_node_keep(draw[i] = mil_random_uniform(tape, names[k][i], 1, &shape));
        if (!CHECK(mil_tape_run(tape) == MIL_OK)) puts(mil_error(ctx));
        for (int i = 0; i < 5; i++) {
            CHECK(mil_node_read(draw[i], v[i], 3) == MIL_OK);
            for (int j = 0; j < i; j++) if (!CHECK(memcmp(v[i], v[j], sizeof v[i]) != 0)) printf("  set %d: draws %d and %d\n", k, j, i);
        }
        mil_tape_free(tape);
    }
    mil_context_free(ctx);
}

TEST(draws_depend_on_seed_step_name_and_element_only)
{
    enum { N = 5000 };
    const int64_t shape[2] = { N, 2 };
    static mil_real v[4][2 * N];
    static int64_t p[2][N];
    char seen[N];
    double mean = 0, square = 0, uniform = 0;
    for (int threads = 1; threads <= 3; threads += 2) {
        mil_context *ctx = context_new(threads);
        mil_tape *tape = tape_new(ctx);
        mil_tape_seed(tape, 42, 7);
        mil_node *u = mil_random_uniform(tape, "u", 2, shape), *g = mil_random_normal(tape, "g", 2, shape), *q = mil_random_permutation(tape, "p", N);
        mil_node *u1 = mil_random_uniform(tape, "u", 2, shape);
        mil_node_keep(u); mil_node_keep(g); mil_node_keep(q); mil_node_keep(u1);
        CHECK(mil_tape_run(tape) == MIL_OK);
        const int k = threads == 1 ? 0 : 2;
        CHECK(mil_node_read(u, v[k], 2 * N) == MIL_OK && mil_node_read(g, v[k + 1], 2 * N) == MIL_OK && mil_node_read(q, p[k / 2], N) == MIL_OK);
        static mil_real again[2 * N];
        CHECK(mil_node_read(u1, again, 2 * N) == MIL_OK && memcmp(again, v[k], sizeof again) != 0);
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
    CHECK(memcmp(v[0], v[2], sizeof v[0]) == 0 && memcmp(v[1], v[3], sizeof v[0]) == 0 && memcmp(p[0], p[1], sizeof p[0]) == 0);
    memset(seen, 0, sizeof seen);
    for (int i = 0; i < N; i++) {
        CHECK(p[0][i] >= 0 && p[0][i] < N && !seen[p[0][i]]);
        seen[p[0][i]] = 1;
    }
    for (int i = 0; i < 2 * N; i++) {
        CHECK(v[0][i] >= 0 && v[0][i] < 1);
        uniform += (double)v[0][i] / (2 * N);
        mean += (double)v[1][i] / (2 * N);
        square += (double)v[1][i] * (double)v[1][i] / (2 * N);
    }
    CHECK(fabs(uniform - 0.5) < 0.015 && fabs(mean) < 0.05 && fabs(square - 1) < 0.07);      // five standard errors
}

// ---- gradients ----
static void computes_nothing(const mil_exec *x) { (void)x; }

TEST(an_op_without_gradient_is_an_error_under_training)
{
    static const mil_op op = { "custom", computes_nothing, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0 };
    mil_real w[2] = { 1, 2 };
    mil_param p = param_make("w", w, 1, 2, 0);
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_tape_training(tape, 1);
    mil_tape_push(tape, "head");
    mil_spec s = mil_spec_make(&op, MIL_KIND_WHOLE, 1, p.shape);
    s.input_count = 1;
    s.input[0] = mil_use(tape, &p);
    CHECK(mil_record(tape, &s) == NULL);
    CHECK(mil_tape_run(tape) == MIL_ERROR_UNSUPPORTED);
    CHECK_STRING(mil_error(ctx), "head: custom: has no gradient, but a parameter stands below it");
    mil_tape_reset(tape);
    p.frozen = 1;                                          // a frozen parameter wants none
    s.input[0] = mil_use(tape, &p);
    CHECK(mil_record(tape, &s) != NULL);
    p.frozen = 0;
    mil_tape_reset(tape);
    s.input[0] = mil_detach(mil_use(tape, &p));            // nor does a detached one
    CHECK(mil_record(tape, &s) != NULL);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(backward_checks_what_it_is_given)
{
    mil_real w[2] = { 1, 2 };
    mil_param p = param_make("w", w, 1, 2, 0);
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_node *y = mil_square(mil_use(tape, &p));
    CHECK(mil_tape_backward(tape, y) == MIL_ERROR_SHAPE);
    mil_tape_run(tape);
    CHECK_CONTAINS(mil_error(ctx), "the loss is one number, this is [2]");
    mil_tape_reset(tape);
    CHECK(mil_tape_backward(tape, NULL) == MIL_ERROR_ARGUMENT);
    mil_tape_reset(tape);
    y = mil_sum_all(mil_square(mil_use(tape, &p)));
    mil_tape_push(tape, "here");
    CHECK(mil_tape_backward(tape, y) == MIL_OK);
    mil_node *g = mil_node_grad(mil_use(tape, &p));
    mil_node_keep(g);
    CHECK(mil_tape_run(tape) == MIL_OK);
    mil_real v[2];
    CHECK(mil_node_read(g, v, 2) == MIL_OK && v[0] == 2 && v[1] == 4);
    CHECK(mil_tape_backward(tape, y) == MIL_ERROR_STATE);
    mil_tape_run(tape);
    CHECK_CONTAINS(mil_error(ctx), "here: mil_tape_backward: once per tape");       // and the caller's scope is still there
    mil_tape_reset(tape);
    mil_node *x = mil_use(tape, &p), *dy = mil_constant(tape, 0, NULL, 1);
    y = mil_square(x);
    CHECK(mil_tape_backward_from(tape, &y, &dy, 1) == MIL_ERROR_SHAPE);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(backward_without_results_or_cotangents_fails)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_node *y = mil_square(matrix(tape, 2, 2));
    CHECK(mil_tape_backward_from(tape, NULL, NULL, 1) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "no results or no cotangents");
    mil_tape_reset(tape);
    y = mil_square(matrix(tape, 2, 2));
    CHECK(mil_tape_backward_from(tape, &y, NULL, 1) == MIL_ERROR_ARGUMENT);
    mil_tape_reset(tape);
    CHECK(mil_tape_backward_from(tape, NULL, NULL, 0) == MIL_OK);      // of nothing there is nothing to record
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(a_cotangent_of_another_dtype_is_converted)
{
    static const double g64[4] = { 1, 2, 3, 4 };
    static const float g32[4] = { 1, 2, 3, 4 };
    mil_real data[4] = { 5, 6, 7, 8 }, v[5];
    const int64_t shape = 4;
    mil_context *ctx = context_new(1);
    for (int k = 0; k < 4; k++) {                          // through an op, and of the input itself
        mil_tape *tape = tape_new(ctx);
        const mil_tensor t = k % 2 ? mil_tensor_make(g64, MIL_F64, 1, &shape) : mil_tensor_make(g32, MIL_F32, 1, &shape);
        mil_node *x = reals(tape, data, 1, 4, 0, 0);
        mil_node_want_grad(x);
        mil_node *y = k < 2 ? mil_affine(x, 2, 0) : x, *dy = mil_input(tape, "dy", &t);
        CHECK(mil_tape_backward_from(tape, &y, &dy, 1) == MIL_OK);
        mil_node *g = mil_node_grad(x);
        mil_node_keep(g);
        v[4] = 77;
        CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(g, v, 4) == MIL_OK);
        for (int i = 0; i < 4; i++) CHECK(v[i] == (mil_real)((k < 2 ? 2 : 1) * (i + 1)));
        CHECK(v[4] == 77);                                 // and nothing behind it is written
        mil_tape_free(tape);
    }
    mil_context_free(ctx);
}

// An op that has read the input already would give no gradient, and nobody would notice.
TEST(a_gradient_wanted_after_the_input_was_read_fails_the_tape)
{
    mil_real data[4] = { 1, 2, 3, 4 };
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_node *x = reals(tape, data, 1, 4, 0, 0), *y = mil_sum_all(mil_exp(x));
    mil_node_want_grad(x);
    CHECK(mil_tape_status(tape) == MIL_ERROR_STATE);
    CHECK(mil_tape_backward(tape, y) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(ctx), "mil_node_want_grad: exp reads it already");
    mil_tape_reset(tape);
    x = reals(tape, data, 1, 4, 0, 0);
    mil_node_want_grad(x);
    y = mil_sum_all(mil_exp(x));
    mil_node_want_grad(x);                                 // once more changes nothing
    CHECK(mil_tape_backward(tape, y) == MIL_OK && mil_node_grad(x) != NULL);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// Recorded only: no machine has the memory. The gradient pads with more zeros than 32 bits count.
TEST(the_gradient_of_a_slice_far_behind_is_recorded)
{
    const int64_t length = (int64_t)3000000000;
    mil_real data[1] = { 0 };
    if (sizeof(size_t) < 8) return;                        // no such shape there
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_node *x = reals(tape, data, 1, length, 0, 0);
    mil_node_want_grad(x);
    if (!CHECK(mil_tape_backward(tape, mil_sum_all(mil_slice(x, 0, length - 500000000, 4))) == MIL_OK)) puts(mil_error(ctx));
    mil_node *g = mil_node_grad(x);
    CHECK(g && g->rank == 1 && g->shape[0] == length);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(a_loss_that_depends_on_no_parameter_has_no_gradients)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_real data[2] = { 1, 2 };
    mil_node *x = reals(tape, data, 1, 2, 0, 0), *loss = mil_sum_all(x);
    CHECK(mil_tape_backward(tape, loss) == MIL_OK && mil_node_grad(x) == NULL);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// ---- ops from outside the header ----
// ROWS: y = x * t^2 with t one number for all rows, given as input 1; gradient by x only with t fixed, by t as a reduction.
static void scale2_run(const mil_exec *x)
{
    const mil_real *a = (const mil_real *)x->in[0], t = *(const mil_real *)x->in[1];
    for (int64_t i = 0; i < x->rows * x->node->cols; i++) ((mil_real *)x->out)[i] = a[i] * t * t;
}
static void scale2_grad(mil_node *n, mil_node *dy)
{
    mil_node *x = n->input[0], *t = n->input[1];
    if (mil_wants_grad(x)) mil_add_grad(x, mil_mul(dy, mil_square(t)));
    if (mil_wants_grad(t)) mil_add_grad(t, mil_reshape(mil_affine(mil_mul(mil_sum_all(mil_mul(dy, x)), mil_reshape(t, 0, NULL)), 2, 0), t->rank, t->shape));
}
static const mil_op scale2 = { "scale2", scale2_run, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, scale2_grad, 0 };

// REDUCE: s[j] = sum_i x[i,j]^2; the second result counts the rows.
static size_t energy_state(const mil_node *n) { return (size_t)(n->cols + 1) * sizeof(mil_real); }
static void energy_begin(const mil_exec *x) { memset(x->state, 0, energy_state(x->node)); }
static void energy_step(const mil_exec *x)
{
    mil_real *s = (mil_real *)x->state;
    const mil_real *a = (const mil_real *)x->in[0];
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t j = 0; j < x->node->cols; j++) s[j] += a[r * x->node->cols + j] * a[r * x->node->cols + j];
    s[x->node->cols] += (mil_real)x->rows;
}
static void energy_merge(const mil_exec *x, void *into, const void *from)
{
    for (int64_t j = 0; j <= x->node->cols; j++) ((mil_real *)into)[j] += ((const mil_real *)from)[j];
}
static void energy_finish(const mil_exec *x)
{
    memcpy(x->out, x->state, (size_t)x->node->cols * sizeof(mil_real));
    if (x->second) *(mil_real *)x->second = ((const mil_real *)x->state)[x->node->cols];
}
static void energy_grad(mil_node *n, mil_node *dy) { mil_add_grad(n->input[0], mil_affine(mil_mul(n->input[0], dy), 2, 0)); }
static const mil_op energy = { "energy", NULL, energy_state, energy_begin, energy_step, energy_merge, energy_finish, NULL, NULL, NULL, energy_grad, 0 };

// WHOLE: the rows in reverse, a task per 100 rows, through scratch.
static size_t flip_scratch(const mil_node *n) { return (size_t)n->cols * sizeof(mil_real); }
static void flip_task(void *arg, int64_t index, void *scratch)
{
    const mil_exec *x = (const mil_exec *)arg;
    const size_t row = (size_t)x->node->cols * sizeof(mil_real);
    for (int64_t r = index * 100; r < index * 100 + 100 && r < x->all_rows; r++) {
        memcpy(scratch, (const char *)x->in[0] + (size_t)r * row, row);
        memcpy((char *)x->out + (size_t)(x->all_rows - 1 - r) * row, scratch, row);
    }
}
static void flip_run(const mil_exec *x)
{
    union { const mil_exec *c; void *m; } u;
    u.c = x;
    mil_exec_parallel(x, (x->all_rows + 99) / 100, flip_task, u.m);
}
static mil_node *flip_record(mil_node *x);
static void flip_grad(mil_node *n, mil_node *dy) { mil_add_grad(n->input[0], flip_record(dy)); }
static const mil_op flip = { "flip", flip_run, NULL, NULL, NULL, NULL, NULL, flip_scratch, NULL, NULL, flip_grad, 0 };
static mil_node *flip_record(mil_node *x)
{
    mil_spec s = mil_spec_make(&flip, MIL_KIND_WHOLE, x->rank, x->shape);
    s.input_count = 1;
    s.input[0] = x;
    return mil_record(x->tape, &s);
}

TEST(ops_from_outside_run_in_all_three_kinds_with_gradients)
{
    enum { N = 777, E = 5 };
    static mil_real data[N * E], gx[N * E];
    mil_real t[1] = { 3 }, w[E], counted, got[E], gt;
    fill(data, N * E, 3);
    fill(w, E, 4);
    double energies[E] = { 0 };
    for (int i = 0; i < N * E; i++) energies[i % E] += 81.0 * (double)data[i] * (double)data[i];
    for (int option = 0; option < 3; option++) {
        mil_context *ctx = context_new(option + 1);
        mil_tape *tape = tape_new(ctx);
        if (option) mil_tape_set(tape, option == 1 ? MIL_TAPE_NO_GROUPS : MIL_TAPE_POISON, 1);
        mil_tape_training(tape, 1);
        mil_node *x = reals(tape, data, 2, N, E, 0), *scale = reals(tape, t, 1, 1, 0, 0);
        mil_node_want_grad(x);
        mil_node_want_grad(scale);
        mil_spec s = mil_spec_make(&scale2, MIL_KIND_ROWS, 2, x->shape);
        s.input_count = 2;
        s.input[0] = mil_relu(mil_add(x, mil_affine(x, -2, 0)));       // relu(-x), in the same group
        s.input[0] = mil_sub(s.input[0], mil_relu(x));                 // -x
        s.input[1] = scale;
        s.row_inputs = 1;
        mil_node *y = mil_record(tape, &s);
        s = mil_spec_make(&energy, MIL_KIND_REDUCE, 2, x->shape);
        s.shape[0] = 1;
        s.outer = 1;
        s.in_rows = N;
        s.input_count = 1;
        s.input[0] = flip_record(y);
        s.row_inputs = 1;
        mil_node *e = mil_record(tape, &s);
        const int64_t one[2] = { 1, 1 };
        mil_node *rows = mil_node_second(e, MIL_REAL_DTYPE, 2, one);
        mil_node *loss = mil_sum_all(mil_mul(e, reals(tape, w, 1, E, 0, 0)));
        mil_tape_backward(tape, loss);
        mil_node_keep(e);
        mil_node_keep(rows);
        mil_node_keep(mil_node_grad(x));
        mil_node_keep(mil_node_grad(scale));
        if (CHECK(mil_tape_run(tape) == MIL_OK)) {
            CHECK(mil_node_read(e, got, E) == MIL_OK && mil_node_read(rows, &counted, 1) == MIL_OK && counted == N);
            for (int j = 0; j < E; j++) CHECK_NEAR(got[j], energies[j], 1e-5);
            CHECK(mil_node_read(mil_node_grad(x), gx, N * E) == MIL_OK && mil_node_read(mil_node_grad(scale), &gt, 1) == MIL_OK);
            for (int i = 0; i < N * E; i++) CHECK_NEAR(gx[i], 2 * 81.0 * (double)data[i] * (double)w[i % E], 1e-4);
            double expected = 0;                           // d/dt t^4 = 4 t^3
            for (int j = 0; j < E; j++) expected += (double)w[j] * energies[j] / 81 * 4 * 27;
            CHECK_NEAR(gt, expected, 1e-4);
        } else puts(mil_error(ctx));
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
}

// ---- inputs as they come ----
static void put(unsigned char *at, mil_dtype dtype, int value)
{
    const float f32 = (float)value; const double f64 = value;
    const int8_t i8 = (int8_t)value; const uint8_t u8 = (uint8_t)value; const int16_t i16 = (int16_t)value; const uint16_t u16 = (uint16_t)value;
    const int32_t i32 = value; const uint32_t u32 = (uint32_t)value; const int64_t i64 = value; const uint64_t u64 = (uint64_t)value;
    static const uint16_t f16[8] = { 0x0000, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700 }, bf16[8] = { 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0 };
    switch (dtype) {
    case MIL_F32: memcpy(at, &f32, 4); break;
    case MIL_F64: memcpy(at, &f64, 8); break;
    case MIL_F16: memcpy(at, &f16[value], 2); break;
    case MIL_BF16: memcpy(at, &bf16[value], 2); break;
    case MIL_I8: memcpy(at, &i8, 1); break;
    case MIL_U8: case MIL_BOOL: memcpy(at, &u8, 1); break;
    case MIL_I16: memcpy(at, &i16, 2); break;
    case MIL_U16: memcpy(at, &u16, 2); break;
    case MIL_I32: memcpy(at, &i32, 4); break;
    case MIL_U32: memcpy(at, &u32, 4); break;
    case MIL_I64: memcpy(at, &i64, 8); break;
    default: memcpy(at, &u64, 8); break;
    }
}

TEST(an_op_from_outside_is_told_what_it_forgot)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    const int64_t shape[2] = { 5, 3 }, one[2] = { 1, 3 };
    static const mil_real v[15] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
    const mil_tensor t = mil_tensor_make(v, MIL_REAL_DTYPE, 2, shape);
    for (int k = 0; k < 5; k++) {
        static const char *const sentence[5] = { "scale2: row_inputs is 0, though rows are computed from 2 inputs", "energy: row_inputs is 0",
            "scale2: row_inputs 0x5 names an input beyond the last of 2", "scale2: input 1 [] cannot be cut into 1 x 5 rows",
            "energy: input 0 [5, 3] cannot be cut into 0 x 0 rows" };
        mil_tape_reset(tape);
        const int reduce = k == 1 || k == 4;
        mil_spec s = mil_spec_make(reduce ? &energy : &scale2, reduce ? MIL_KIND_REDUCE : MIL_KIND_ROWS, 2, reduce ? one : shape);
        s.input_count = reduce ? 1 : 2;
        s.input[0] = mil_input(tape, "x", &t);
        s.input[1] = mil_constant(tape, 0, NULL, 2);
        s.row_inputs = k == 2 ? 5 : k == 3 ? 2 : k == 4;
        if (k == 1) s.in_rows = 5;
        if (k == 1) s.outer = 1;
        CHECK(mil_record(tape, &s) == NULL);
        CHECK_CONTAINS(mil_tape_error(tape), sentence[k]);
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(what_no_kernel_could_compute_is_not_recorded)
{
    static const mil_op empty = { "empty", NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0 };
    static const struct { const mil_op *op; int kind, dtype, inputs; int64_t rows, outer, in_rows; const char *text; } wrong[] = {
        { &scale2, 42, MIL_REAL_DTYPE, 1, 4, 0, 0, "scale2: kind 42; an op makes a view, rows, a reduction or a whole" },
        { &scale2, -1, MIL_REAL_DTYPE, 1, 4, 0, 0, "scale2: kind -1" },
        { &scale2, MIL_KIND_LEAF, MIL_REAL_DTYPE, 0, 4, 0, 0, "an op makes a view" },
        { &scale2, MIL_KIND_ROWS, 99, 1, 4, 0, 0, "scale2: dtype 99; a value is" },
        { &scale2, MIL_KIND_ROWS, MIL_F16, 1, 4, 0, 0, "a value is" },
        { &scale2, MIL_KIND_VIEW, MIL_REAL_DTYPE, 0, 4, 0, 0, "scale2: a view has one input, of as many elements" },
        { &scale2, MIL_KIND_VIEW, MIL_REAL_DTYPE, 1, 4000, 0, 0, "scale2: a view has one input, of as many elements" },
        { &scale2, MIL_KIND_VIEW, MIL_REAL_DTYPE, 1, 2, 0, 0, "scale2: a view has one input, of as many elements" },
        { &scale2, MIL_KIND_REDUCE, MIL_REAL_DTYPE, 1, 1, 1, 4, "scale2: the op lacks a function that this kind needs" },
        { &energy, MIL_KIND_ROWS, MIL_REAL_DTYPE, 1, 4, 0, 0, "energy: the op lacks a function that this kind needs" },
        { &energy, MIL_KIND_WHOLE, MIL_REAL_DTYPE, 1, 4, 0, 0, "energy: the op lacks a function that this kind needs" },
        { &empty, MIL_KIND_WHOLE, MIL_REAL_DTYPE, 1, 4, 0, 0, "empty: the op lacks a function that this kind needs" },
        { &energy, MIL_KIND_REDUCE, MIL_REAL_DTYPE, 1, 1, -1, -4, "energy: -1 reductions of -4 rows" },
        { &energy, MIL_KIND_REDUCE, MIL_REAL_DTYPE, 1, 1, -1, 4, "energy: -1 reductions of 4 rows" },
        { &energy, MIL_KIND_REDUCE, MIL_REAL_DTYPE, 1, 1, 1, -4, "energy: 1 reductions of -4 rows" },
        { &energy, MIL_KIND_REDUCE, MIL_REAL_DTYPE, 1, 1, INT64_MAX, 4, "energy: 9223372036854775807 reductions of 4 rows" },
        { &energy, MIL_KIND_REDUCE, MIL_REAL_DTYPE, 1, 1, (int64_t)1 << 31, (int64_t)1 << 31, "energy: 2147483648 reductions of 2147483648 rows" },
    };
    static const mil_real v[12] = { 0 };
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    for (int k = 0; k < COUNT(wrong); k++) {
        const int64_t shape[2] = { wrong[k].rows, 3 };
        mil_tape_reset(tape);
        mil_spec s = mil_spec_make(wrong[k].op, (mil_kind)wrong[k].kind, 2, shape);
        s.dtype = (mil_dtype)wrong[k].dtype;
        s.outer = wrong[k].outer;
        s.in_rows = wrong[k].in_rows;
        s.input_count = wrong[k].inputs;
        s.input[0] = reals(tape, v, 2, 4, 3, 0);
        s.row_inputs = wrong[k].inputs ? 1 : 0;
        CHECK(mil_record(tape, &s) == NULL);
        CHECK(mil_tape_status(tape) == MIL_ERROR_ARGUMENT || mil_tape_status(tape) == MIL_ERROR_SHAPE);
        CHECK_CONTAINS(mil_tape_error(tape), wrong[k].text);
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(a_second_result_is_one_value_of_an_op_yet_to_run)
{
    static const mil_real v[12] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 };
    const int64_t column[2] = { 4, 1 }, one[2] = { 1, 1 };
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    for (int k = 0; k < 7; k++) {
        static const char *const text[7] = { "mil_node_second: scale2 has one already", "mil_node_second: scale2 has run", "mil_node_second: input computes nothing",
            "mil_node_second: reshape computes nothing", "mil_node_second: of ?, a value is", "mil_node_second: of F16, a value is",
            "mil_node_second: scale2 makes rows of [4, 3], the second result is [1, 1]" };
        mil_tape_reset(tape);
        mil_node *x = reals(tape, v, 2, 4, 3, 0);
        const int64_t flat = 12;
        mil_spec s = mil_spec_make(&scale2, MIL_KIND_ROWS, 2, x->shape);
        s.input_count = 2;
        s.input[0] = x;
        s.input[1] = mil_constant(tape, 0, NULL, 2);
        s.row_inputs = 1;
        mil_node *y = mil_record(tape, &s);
        mil_node_keep(y);
        if (k == 0) CHECK(mil_node_second(y, MIL_REAL_DTYPE, 2, column) != NULL);
        if (k == 1) CHECK(mil_tape_run(tape) == MIL_OK);
        const int dtype = k == 4 ? 77 : k == 5 ? MIL_F16 : MIL_REAL_DTYPE;
        CHECK(!mil_node_second(k == 2 ? x : k == 3 ? mil_reshape(y, 1, &flat) : y, (mil_dtype)dtype, 2, k == 6 ? one : column));
        CHECK(mil_tape_status(tape) != MIL_OK);
        CHECK_CONTAINS(mil_tape_error(tape), text[k]);
    }
    CHECK(mil_node_second(NULL, MIL_REAL_DTYPE, 2, one) == NULL);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(inputs_of_an_op_from_outside_arrive_as_mil_real)
{
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    int16_t filled[300 * 4];
    mil_real got[300 * 3];
    mil_tensor t = mil_tensor_matrix(filled, MIL_I16, 300, 3);
    for (int i = 0; i < 300 * 4; i++) filled[i] = (int16_t)(i - 500);
    t.stride[0] = 4 * 2;                                   // and strided
    t.stride[1] = 2;
    mil_spec s = mil_spec_make(&scale2, MIL_KIND_ROWS, 2, t.shape);
    s.input_count = 2;
    s.input[0] = mil_input(tape, "x", &t);
    s.input[1] = mil_constant(tape, 0, NULL, 2);
    s.row_inputs = 1;
    mil_node *y = mil_record(tape, &s);
    mil_node_keep(y);
    CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(y, got, 900) == MIL_OK);
    for (int i = 0; i < 900; i++) if (!CHECK(got[i] == (mil_real)(4 * (i / 3 * 4 + i % 3 - 500)))) break;
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(inputs_of_every_dtype_stride_and_alignment_give_the_same_numbers)
{
    enum { B = 2, N = 150, D = 3, BYTES = B * N * D * 8 * 8 };
    static unsigned char block[BYTES + 64];
    static mil_real expected[D], v[B * N * D], got[B * N * D];
    mil_context *ctx = context_new(2);
    for (int dtype = 0; dtype < MIL_DTYPE_COUNT; dtype++)
        for (int layout = 0; layout < 4; layout++) {       // packed; packed but shifted by a byte; wide columns; columns first
            const int64_t size = (int64_t)mil_dtype_size((mil_dtype)dtype);
            const int top = dtype == MIL_BOOL ? 2 : 8;
            const int64_t shape[3] = { B, N, D };
            mil_tensor t = mil_tensor_make(block + (layout == 1), (mil_dtype)dtype, 3, shape);
            int64_t step[3] = { N * D * size, D * size, size };
            if (layout == 2) { step[2] = 3 * size + 1; step[1] = D * step[2] + 5; step[0] = N * step[1]; }
            if (layout == 3) { step[1] = size; step[2] = N * size; step[0] = D * N * size; }
            if (layout >= 2) memcpy(t.stride, step, sizeof step);
            memset(expected, 0, sizeof expected);
            for (int64_t i = 0; i < B * N * D; i++) {
                const int value = (int)((i * 7 + i / 11) % top);
                const int64_t b = i / (N * D), n = i / D % N, d = i % D;
                put(block + (layout == 1) + b * step[0] + n * step[1] + d * step[2], (mil_dtype)dtype, value);
                v[i] = (mil_real)value;
                expected[d] += (mil_real)value;
            }
            mil_tape *tape = tape_new(ctx);
            mil_node *x = mil_input(tape, "x", &t), *y = dtype == MIL_I64 ? NULL : mil_affine(x, 1, 0), *s = dtype == MIL_I64 ? NULL : mil_sum(mil_sum(x, 1), 0);
            const int64_t flat[1] = { B * N * D };
            const mil_tensor column = mil_tensor_matrix(v, MIL_REAL_DTYPE, 8, 1);
            if (dtype != MIL_F32 && dtype != MIL_F64 && dtype != MIL_F16 && dtype != MIL_BF16) {
                // as an index, too: both uses of one input
                mil_node *table = mil_input(tape, "table", &column);
                if (dtype == MIL_I64) {
                    y = mil_gather(table, mil_reshape(x, 1, flat), 0);
                    mil_node *hot = mil_one_hot(x, 8);
                    s = mil_sum_all(hot);
                } else {
                    mil_node *hot = mil_one_hot(x, 8);
                    y = mil_add(y, mil_mul(mil_reshape(mil_affine(mil_sum(hot, -1), 1, -1), 3, shape), y));
                }
            }
            mil_node_keep(y);
            mil_node_keep(s);
            if (CHECK(mil_tape_run(tape) == MIL_OK) && CHECK(mil_node_read(y, got, B * N * D) == MIL_OK)) {
                if (dtype == MIL_I64) {
                    for (int64_t i = 0; i < B * N * D; i++) CHECK(got[i] == v[(int)v[i]]);
                    CHECK_NEAR(read_one(s), B * N * D, 0);
                } else {
                    CHECK(memcmp(got, v, sizeof v) == 0);
                    CHECK(mil_node_read(s, got, D) == MIL_OK && memcmp(got, expected, sizeof expected) == 0);
                }
            } else printf("  dtype %s layout %d: %s\n", mil_dtype_name((mil_dtype)dtype), layout, mil_error(ctx));
            mil_tape_free(tape);
        }
    mil_context_free(ctx);
}

// An input is a value like others: what is read are numbers of mil_real, not the bytes that happen to stand there.
TEST(an_input_of_any_dtype_and_stride_is_read_as_mil_real)
{
    static const mil_dtype dtypes[] = { MIL_F64, MIL_F32, MIL_F16, MIL_U8 };
    unsigned char bytes[2 * 3 * 2 * 8 + 16];
    mil_real got[7];
    mil_context *ctx = context_new(1);
    for (int k = 0; k < COUNT(dtypes); k++)
        for (int strided = 0; strided < 2; strided++) {
            const int64_t size = (int64_t)mil_dtype_size(dtypes[k]), step = size * (1 + strided), line = 3 * step + strided;
            mil_tape *tape = tape_new(ctx);
            mil_tensor t = mil_tensor_matrix(bytes, dtypes[k], 2, 3);
            memset(bytes, 0xff, sizeof bytes);
            for (int i = 0; i < 6; i++) put(bytes + i / 3 * line + i % 3 * step, dtypes[k], i + 1);
            if (strided) {
                t.stride[0] = line;
                t.stride[1] = step;
            }
            mil_node *x = mil_input(tape, "x", &t);
            mil_node_keep(x);
            CHECK(mil_tape_run(tape) == MIL_OK);
            got[6] = 77;
            if (!CHECK(mil_node_read(x, got, 6) == MIL_OK)) puts(mil_error(ctx));
            for (int i = 0; i < 6; i++) CHECK(got[i] == (mil_real)(i + 1));
            CHECK(got[6] == 77);                           // and nothing behind it is written
            CHECK(mil_node_read(x, NULL, 6) == MIL_ERROR_ARGUMENT);
            CHECK_CONTAINS(mil_error(ctx), "mil_node_read: dst is NULL");
            mil_tape_free(tape);
        }
    mil_context_free(ctx);
}

// The first op has the input converted, in a tile that is gone after the run; a second stage converts it again.
TEST(an_input_converted_in_one_run_is_converted_again_in_the_next)
{
    static const uint16_t half[4] = { 0x3c00, 0x4000, 0x4200, 0x4400 };
    const int64_t four = 4, square[2] = { 2, 2 };
    mil_real got[4];
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    const mil_tensor t = mil_tensor_make(half, MIL_F16, 1, &four);
    mil_node *x = mil_input(tape, "x", &t), *y = mil_exp(x);
    mil_node_keep(y);
    CHECK(mil_tape_run(tape) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        mil_node *z = k == 0 ? mil_reshape(x, 1, &four) : k == 1 ? mil_reshape(x, 2, square) : mil_affine(x, 1, 0);
        mil_node_keep(z);
        if (!CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(z, got, 4) == MIL_OK)) puts(mil_error(ctx));
        for (int i = 0; i < 4; i++) CHECK(got[i] == (mil_real)(i + 1));
    }
    CHECK(mil_tape_rerun(tape) == MIL_OK && mil_node_read(y, got, 4) == MIL_OK);
    CHECK_NEAR(got[3], exp(4), 1e-6);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(large_integer_indices_are_exact)
{
    const int32_t index[2] = { 16777217, -5 };             // no float holds the first
    const uint64_t big[1] = { (uint64_t)1 << 63 };
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    const int64_t two = 2, one = 1;
    mil_tensor t = mil_tensor_make(index, MIL_I32, 1, &two);
    mil_node_keep(mil_one_hot(mil_input(tape, "labels", &t), 3));
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "one_hot: index 16777217 at 0 is outside 0..2");
    mil_tape_reset(tape);
    t = mil_tensor_make(big, MIL_U64, 1, &one);
    mil_node_keep(mil_one_hot(mil_input(tape, "labels", &t), 3));
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(an_index_out_of_range_is_an_error_of_the_run_and_the_tape_runs_again)
{
    mil_real data[6] = { 1, 2, 3, 4, 5, 6 }, v[2];
    int64_t index[2] = { 0, 3 };
    const int64_t two = 2;
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    const mil_tensor t = mil_tensor_make(index, MIL_I64, 1, &two);
    mil_tape_push(tape, "select");
    mil_node *x = reals(tape, data, 2, 3, 2, 0), *i = mil_input(tape, "index", &t), *y = mil_sum(mil_gather(x, i, 0), 1);
    mil_tape_pop(tape);
    mil_node_keep(y);
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "select: gather: index 3 at 1 is outside 0..2");
    CHECK(mil_node_read(y, v, 2) == MIL_ERROR_STATE);
    index[1] = -1;
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "index -1 at 1");
    index[1] = 2;
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK(mil_node_read(y, v, 2) == MIL_OK && v[0] == 3 && v[1] == 11);
    index[0] = 7;
    CHECK(mil_tape_rerun(tape) == MIL_ERROR_ARGUMENT);
    index[0] = 1;
    CHECK(mil_tape_rerun(tape) == MIL_OK);
    CHECK(mil_node_read(y, v, 2) == MIL_OK && v[0] == 7);
    mil_node_keep(mil_scatter_add(y, i, 0, 1));
    CHECK(mil_tape_run(tape) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "scatter_add: index 1 at 0 is outside 0..0");
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(only_what_is_kept_and_what_it_needs_is_run)
{
    mil_real data[6] = { 1, 2, 3, 4, 5, 6 };
    int64_t index[1] = { 99 };
    const int64_t one = 1;
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    const mil_tensor t = mil_tensor_make(index, MIL_I64, 1, &one);
    mil_node *x = reals(tape, data, 2, 3, 2, 0);
    mil_node *unused = mil_gather(x, mil_input(tape, "index", &t), 0), *y = mil_sum_all(x);
    CHECK(unused != NULL);
    mil_node_keep(y);
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK_NEAR(read_one(y), 21, 0);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(a_deep_tape_of_small_nodes_runs_and_gives_the_right_gradient)
{
    mil_real w[3] = { (mil_real)0.1, (mil_real)0.2, (mil_real)0.3 }, v[3];
    mil_param p = param_make("w", w, 1, 3, 0);
    mil_context *ctx = context_new(1);
    mil_tape *tape = tape_new(ctx);
    mil_tape_training(tape, 1);
    mil_node *x = mil_use(tape, &p), *y = x;
    for (int i = 0; i < 3000; i++) y = mil_affine(mil_mul(mil_add(y, x), mil_constant(tape, 0, NULL, 0.5)), 1, 0);   // tends to x; linear in x
    mil_tape_backward(tape, mil_sum_all(y));
    mil_node *g = mil_node_grad(x);
    mil_node_keep(g);
    mil_node_keep(y);
    CHECK(mil_tape_bytes(tape) < 3000 * 64 + 20000);       // the constants, which forward and backward read; all else is short-lived
    CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(g, v, 3) == MIL_OK);
    for (int i = 0; i < 3; i++) CHECK_NEAR(v[i], 1, 1e-5);
    CHECK(mil_node_read(y, v, 3) == MIL_OK);
    for (int i = 0; i < 3; i++) CHECK_NEAR(v[i], w[i], 1e-5);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TESTS(T(planned_memory_gives_the_bits_of_unshared_memory) T(node_by_node_agrees_with_row_groups) T(any_number_of_threads_gives_the_same_bits)
      T(recomputing_in_the_backward_pass_gives_the_same_bits) T(bytes_asked_for_are_the_bytes_then_allocated)
      T(a_tape_larger_than_all_memory_is_refused) T(many_values_of_all_lives_share_memory_without_harm)
      T(scoring_memory_does_not_grow_with_the_rows) T(training_memory_does_not_grow_with_the_rows_when_recomputing)
      T(converted_features_are_never_stored_whole) T(the_callers_workspace_is_used_and_a_small_one_refused) T(everything_fits_into_one_fixed_block)
      T(every_failing_allocation_is_an_error_and_leaves_the_tape_usable) T(a_tape_that_has_seen_its_shapes_allocates_nothing)
      T(errors_are_sticky_and_name_layer_op_and_shapes) T(scopes_with_dots_are_popped_whole) T(each_wrong_call_has_its_sentence)
      T(null_arguments_are_no_crash) T(a_tape_runs_in_stages) T(an_update_of_a_lost_value_is_an_error)
      T(bytes_of_a_tape_that_needs_a_lost_value_are_0_and_the_error_says_why)
      T(a_rerun_sees_new_inputs_parameters_seeds_and_runs_updates) T(two_parameters_can_swap) T(draws_are_named_numbered_and_can_be_supplied)
      T(draws_depend_on_seed_step_name_and_element_only) T(an_op_without_gradient_is_an_error_under_training) T(backward_checks_what_it_is_given)
      T(a_loss_that_depends_on_no_parameter_has_no_gradients) T(ops_from_outside_run_in_all_three_kinds_with_gradients)
      T(an_op_from_outside_is_told_what_it_forgot) T(inputs_of_an_op_from_outside_arrive_as_mil_real)
      T(inputs_of_every_dtype_stride_and_alignment_give_the_same_numbers) T(large_integer_indices_are_exact)
      T(an_index_out_of_range_is_an_error_of_the_run_and_the_tape_runs_again) T(only_what_is_kept_and_what_it_needs_is_run)
      T(a_deep_tape_of_small_nodes_runs_and_gives_the_right_gradient) T(a_tape_of_one_wide_row_needs_memory_for_that_row_only)
      T(memory_that_runs_out_while_recording_is_reported_as_that_whatever_failed_before) T(an_option_that_does_not_exist_is_ignored)
      T(an_input_without_elements_needs_no_data) T(what_was_kept_has_its_gradient_after_the_run)
      T(a_parameter_is_updated_from_an_input_of_any_dtype_and_stride) T(updates_that_cannot_be_are_refused)
      T(two_draws_never_share_values_whatever_their_names) T(backward_without_results_or_cotangents_fails)
      T(a_cotangent_of_another_dtype_is_converted) T(a_gradient_wanted_after_the_input_was_read_fails_the_tape)
      T(the_gradient_of_a_slice_far_behind_is_recorded) T(what_no_kernel_could_compute_is_not_recorded)
      T(a_second_result_is_one_value_of_an_op_yet_to_run) T(an_input_of_any_dtype_and_stride_is_read_as_mil_real)
      T(an_input_converted_in_one_run_is_converted_again_in_the_next))
