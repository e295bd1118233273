// build: float double
// A second backend through the public table: plain scalar kernels, one node at a time. With host memory, and with memory of its
// own whose addresses the host cannot touch, so that every missing copy is a crash. Runs the table of op_cases.h.
#include <stdlib.h>
#include "mil.h"
#include "op_cases.h"

// ---- memory: an address of the backend is a host address with the top bit turned, which no host can read ----
typedef struct device { int apart, supports_nothing, fail_at, calls; int64_t ran, uploads, downloads, live; } device;

static void *turned(const device *d, const void *p)
{
    return p && d->apart ? (void *)((uintptr_t)p ^ (uintptr_t)1 << (8 * sizeof(uintptr_t) - 1)) : (void *)(uintptr_t)p;
}

static device the_device;                                  // what the next context opens

static mil_status device_open(void **self, mil_context *ctx) { (void)ctx; *self = &the_device; return MIL_OK; }
static void device_close(void *self, mil_context *ctx) { (void)self, (void)ctx; }
static void *device_allocate(void *self, mil_context *ctx, size_t bytes)
{
    device *d = (device *)self;
    (void)ctx;
    if (++d->calls == d->fail_at) return NULL;
    void *p = malloc(bytes);
    d->live += p != NULL;
    if (p) memset(p, 0xff, bytes);
    return turned(d, p);
}
static void device_release(void *self, mil_context *ctx, void *memory, size_t bytes)
{
    device *d = (device *)self;
    (void)ctx, (void)bytes;
    d->live--;
    free(turned(d, memory));
}
static mil_status device_upload(void *self, void *dst, const void *src, size_t bytes)
{
    device *d = (device *)self;
    d->uploads++;
    if (++d->calls == d->fail_at) return MIL_ERROR_BACKEND;
    memcpy(turned(d, dst), src, bytes);
    return MIL_OK;
}
static mil_status device_download(void *self, void *dst, const void *src, size_t bytes)
{
    device *d = (device *)self;
    d->downloads++;
    if (++d->calls == d->fail_at) return MIL_ERROR_BACKEND;
    memcpy(dst, turned(d, src), bytes);
    return MIL_OK;
}
static mil_status device_synchronize(void *self) { (void)self; return MIL_OK; }

// ---- kernels ----
typedef struct work {                                      // one node's memory, as the kernels see it
    const mil_node *n;
    const mil_real *in[MIL_MAX_INPUTS];
    const int64_t *index[MIL_MAX_INPUTS];                  // the same, where it is an index
    mil_real *y;
    int64_t *y_index, *places;                             // an index result; the second result of a maximum
    mil_real *second;
} work;

static int64_t element_under(const mil_node *in, int rank, const int64_t *shape, int64_t e)      // NumPy's broadcasting
{
    int64_t at = 0, step = 1;
    for (int i = rank - 1; i >= 0; i--) {
        const int j = i - (rank - in->rank);
        const int64_t c = e % shape[i];
        e /= shape[i];
        if (j < 0) continue;
        if (in->shape[j] != 1) at += c * step;
        step *= in->shape[j];
    }
    return at;
}

static double apply1(const char *f, double v, double p, double q)
{
    if (!strcmp(f, "exp")) return exp(v);
    if (!strcmp(f, "log")) return log(v);
    if (!strcmp(f, "sqrt")) return sqrt(v);
    if (!strcmp(f, "square")) return v * v;
    if (!strcmp(f, "abs")) return fabs(v);
    if (!strcmp(f, "reciprocal")) return 1 / v;
    if (!strcmp(f, "tanh")) return tanh(v);
    if (!strcmp(f, "sigmoid")) return 1 / (1 + exp(-v));
    if (!strcmp(f, "relu")) return v > 0 ? v : 0;
    if (!strcmp(f, "gelu")) return v / 2 * (1 + erf(v / sqrt(2.0)));
    if (!strcmp(f, "silu")) return v / (1 + exp(-v));
    if (!strcmp(f, "softplus")) return (v > 0 ? v : 0) + log1p(exp(-fabs(v)));
    if (!strcmp(f, "leaky_relu")) return v > 0 ? v : p * v;
    if (!strcmp(f, "clamp")) return v < p ? p : v > q ? q : v;
    if (!strcmp(f, "affine")) return p * v + q;
    return p;                                              // constant
}

static double apply2(const char *f, double v, double w, double p)
{
    if (!strcmp(f, "add")) return v + w;
    if (!strcmp(f, "sub")) return v - w;
    if (!strcmp(f, "mul")) return v * w;
    if (!strcmp(f, "div")) return v / w;
    if (!strcmp(f, "maximum")) return v >= w ? v : w;
    if (!strcmp(f, "minimum")) return v <= w ? v : w;
    if (!strcmp(f, "mask_fill")) return w != 0 ? v : p;
    if (!strcmp(f, "weights")) return w == -HUGE_VAL ? 0 : exp(v - w);
    return v;                                              // broadcast
}

static void run1(const work *k)
{
    for (int64_t e = 0; e < k->n->count; e++) k->y[e] = (mil_real)apply1(k->n->op->name, k->n->input_count ? (double)k->in[0][e] : 0, k->n->r[0], k->n->r[1]);
}

static void run2(const work *k)
{
    const mil_node *n = k->n, *b = n->input[n->input_count > 1];
    for (int64_t e = 0; e < n->count; e++) {
        const double v = (double)k->in[0][element_under(n->input[0], n->rank, n->shape, e)], w = (double)k->in[n->input_count > 1][element_under(b, n->rank, n->shape, e)];
        k->y[e] = (mil_real)apply2(n->op->name, v, w, n->r[0]);
    }
}

static void run_reduction(const work *k)
{
    const mil_node *n = k->n, *x = n->input[0];
    const char *f = n->op->name;
    int64_t length = 1, inner = 1;
    int axis = 0;
    for (int i = 0; i < n->rank; i++) if (x->shape[i] != n->shape[i]) { axis = i; length = x->shape[i]; }    // none: all have length 1
    for (int i = axis + 1; i < n->rank; i++) inner *= n->shape[i];
    if (length == 1) inner = 1;
    for (int64_t e = 0; e < n->count; e++) {
        const mil_real *a = k->in[0] + e / inner * length * inner + e % inner;
        double sum = 0, top = -HUGE_VAL, low = HUGE_VAL, exps = 0;
        int64_t first = 0, last = 0;
        for (int64_t j = 0; j < length; j++) {
            const double v = (double)a[j * inner];
            sum += v;
            if (v > top) { top = v; first = j; }
            if (v < low) { low = v; last = j; }
        }
        for (int64_t j = 0; j < length; j++) exps += exp((double)a[j * inner] - top);
        const int least = !strcmp(f, "min");
        if (k->places) k->places[e] = least ? last : first;
        if (!strcmp(f, "argmax")) k->y_index[e] = first;
        else k->y[e] = (mil_real)(!strcmp(f, "sum") ? sum : !strcmp(f, "mean") ? sum / (double)length : least ? low : !strcmp(f, "max") ? top : top + log(exps));
    }
}

static void run_softmax(const work *k)
{
    const int64_t m = k->n->cols;
    for (int64_t e = 0; e < k->n->count; e++) {
        const mil_real *row = k->in[0] + e / m * m;
        double sum = 0;
        for (int64_t j = 0; j < m; j++) sum += exp((double)row[j]);
        k->y[e] = (mil_real)(exp((double)row[e % m]) / sum);
    }
}

static void run_linear(const work *k)                      // i[0]: weight [out, in], else [in, out]
{
    const int64_t in = k->n->input[0]->cols, out = k->n->cols;
    for (int64_t e = 0; e < k->n->count; e++) {
        double sum = k->n->input_count > 2 ? (double)k->in[2][e % out] : 0;
        for (int64_t j = 0; j < in; j++) sum += (double)k->in[0][e / out * in + j] * (double)(k->n->i[0] ? k->in[1][e % out * in + j] : k->in[1][j * out + e % out]);
        k->y[e] = (mil_real)sum;
    }
}

static void run_matmul_tn(const work *k)                   // [B, n, p]^T [B, n, q]
{
    const mil_node *a = k->n->input[0];
    const int64_t p = k->n->shape[k->n->rank - 2], q = k->n->cols, n = a->shape[a->rank - 2];
    for (int64_t e = 0; e < k->n->count; e++) {
        const int64_t b = e / (p * q), i = e / q % p, j = e % q;
        double sum = 0;
        for (int64_t r = 0; r < n; r++) sum += (double)k->in[0][(b * n + r) * p + i] * (double)k->in[1][(b * n + r) * q + j];
        k->y[e] = (mil_real)sum;
    }
}

static void run_softmax_pool(const work *k)                // second: log-sum-exp of the scores
{
    const mil_node *s = k->n->input[0];
    const int64_t K = s->cols, E = k->n->cols, N = s->shape[s->rank - 2];
    for (int64_t e = 0; e < k->n->count; e++) {
        const int64_t b = e / (K * E), c = e / E % K;
        double sum = 0, z = 0;
        for (int64_t n = 0; n < N; n++) {
            const double w = exp((double)k->in[0][(b * N + n) * K + c]);
            sum += w;
            z += w * (double)k->in[1][(b * N + n) * E + e % E];
        }
        k->y[e] = (mil_real)(z / sum);
        if (k->second) k->second[b * K + c] = (mil_real)log(sum);
    }
}

static void run_layer_norm(const work *k)
{
    const int64_t m = k->n->cols;
    for (int64_t e = 0; e < k->n->count; e++) {
        const mil_real *row = k->in[0] + e / m * m;
        double mean = 0, var = 0;
        for (int64_t j = 0; j < m; j++) mean += (double)row[j] / (double)m;
        for (int64_t j = 0; j < m; j++) var += ((double)row[j] - mean) * ((double)row[j] - mean) / (double)m;
        const double h = ((double)row[e % m] - mean) / sqrt(var + k->n->r[0]);
        k->y[e] = (mil_real)(k->n->input_count > 1 ? h * (double)k->in[1][e % m] + (double)k->in[2][e % m] : h);
    }
}

static void run_permute(const work *k)                     // i[a]: where axis a comes from
{
    const mil_node *x = k->n->input[0];
    for (int64_t e = 0; e < k->n->count; e++) {
        int64_t rest = e, at = 0, coordinate[MIL_MAX_RANK];
        for (int a = k->n->rank - 1; a >= 0; a--) { coordinate[k->n->i[a]] = rest % k->n->shape[a]; rest /= k->n->shape[a]; }
        for (int a = 0; a < x->rank; a++) at = at * x->shape[a] + coordinate[a];
        k->y[e] = k->in[0][at];
    }
}

static void run_slice(const work *k)                       // i: axis, start
{
    const mil_node *n = k->n, *x = n->input[0];
    for (int64_t e = 0; e < n->count; e++) {
        int64_t rest = e, at = 0, coordinate[MIL_MAX_RANK];
        for (int a = n->rank - 1; a >= 0; a--) { coordinate[a] = rest % n->shape[a] + (a == n->i[0] ? n->i[1] : 0); rest /= n->shape[a]; }
        for (int a = 0; a < x->rank; a++) at = at * x->shape[a] + coordinate[a];
        k->y[e] = k->in[0][at];
    }
}

static void run_gather(const work *k)                      // i: axis
{
    const mil_node *n = k->n, *x = n->input[0];
    for (int64_t e = 0; e < n->count; e++) {
        int64_t rest = e, at = 0, coordinate[MIL_MAX_RANK];
        for (int a = n->rank - 1; a >= 0; a--) { coordinate[a] = rest % n->shape[a]; rest /= n->shape[a]; }
        coordinate[n->i[0]] = k->index[1][coordinate[n->i[0]]];
        for (int a = 0; a < x->rank; a++) at = at * x->shape[a] + coordinate[a];
        k->y[e] = k->in[0][at];
    }
}

static const struct { const char *names; void (*run)(const work *k); } kernels[] = {
    { " exp log sqrt square abs reciprocal tanh sigmoid relu gelu silu softplus leaky_relu clamp affine constant ", run1 },
    { " add sub mul div maximum minimum mask_fill weights broadcast ", run2 },
    { " sum mean max min logsumexp argmax ", run_reduction },
    { " softmax ", run_softmax }, { " linear ", run_linear }, { " matmul_tn ", run_matmul_tn }, { " softmax_pool ", run_softmax_pool },
    { " layer_norm ", run_layer_norm }, { " permute ", run_permute }, { " slice ", run_slice }, { " gather ", run_gather }
};

static void (*kernel_of(const mil_node *node))(const work *)
{
    char word[80];
    snprintf(word, sizeof word, " %.70s ", node->op->name);
    if (node->dtype == MIL_I64 && strcmp(node->op->name, "argmax") != 0) return NULL;
    if (mil_op_find(node->op->name) != node->op) return NULL;          // an op from outside with a name of ours
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) if (strstr(kernels[i].names, word)) return kernels[i].run;
    return NULL;
}

static int device_supports(void *self, const mil_node *node) { return !((device *)self)->supports_nothing && kernel_of(node) != NULL; }

static mil_status device_run(void *self, mil_context *ctx, mil_node *const *nodes, int64_t count)
{
    device *d = (device *)self;
    (void)ctx;
    if (++d->calls == d->fail_at) return MIL_ERROR_BACKEND;
    for (int64_t i = 0; i < count; i++) {
        const mil_node *n = nodes[i];
        work k;
        memset(&k, 0, sizeof k);
        k.n = n;
        for (int j = 0; j < n->input_count; j++) {
            k.in[j] = (const mil_real *)turned(d, n->input[j]->data);
            k.index[j] = (const int64_t *)turned(d, n->input[j]->data);
        }
        k.y = (mil_real *)turned(d, n->data);
        k.y_index = (int64_t *)turned(d, n->data);
        if (n->second && n->second->data) {
            k.second = (mil_real *)turned(d, n->second->data);
            if (n->second->dtype == MIL_I64) k.places = (int64_t *)turned(d, n->second->data);
        }
        kernel_of(n)(&k);
        d->ran++;
    }
    return MIL_OK;
}

static const mil_backend shared = { "scalar", device_open, device_close, device_allocate, device_release, device_upload, device_download, device_supports, device_run, device_synchronize, 1 };
static const mil_backend apart = { "far", device_open, device_close, device_allocate, device_release, device_upload, device_download, device_supports, device_run, device_synchronize, 0 };

static mil_context *context_on(const mil_backend *backend)
{
    mil_context *ctx = NULL;
    mil_context_options options = mil_context_options_default();
    const int keep = the_device.supports_nothing;
    memset(&the_device, 0, sizeof the_device);
    the_device.supports_nothing = keep;
    the_device.apart = backend == &apart;
    options.backend = backend;
    options.threads = 1;
    mil_context_create(&ctx, &options);
    return ctx;
}

static void run_table(const mil_backend *backend, int supports_nothing)
{
    the_device.supports_nothing = supports_nothing;
    mil_context *ctx = context_on(backend);
    if (!CHECK(ctx != NULL)) return;
    op_cases_fill();
    for (int i = 0; i < op_case_count; i++) op_case_check(ctx, &op_cases[i], backend->name, NULL, 0);
    if (supports_nothing) CHECK(the_device.ran == 0 && mil_context_fallbacks(ctx) > op_case_count);
    else CHECK(the_device.ran > 2 * mil_context_fallbacks(ctx) && mil_context_fallbacks(ctx) > 0);
    if (backend == &apart) CHECK(the_device.uploads > op_case_count && the_device.downloads > op_case_count);
    CHECK(the_device.live == 0);
    mil_context_free(ctx);
    the_device.supports_nothing = 0;
}

TEST(a_backend_in_host_memory_runs_every_case) { run_table(&shared, 0); }
TEST(a_backend_with_memory_of_its_own_runs_every_case) { run_table(&apart, 0); }
TEST(a_backend_that_supports_nothing_falls_back_for_every_case) { run_table(&apart, 1); }

// ---- stages, strides, updates, failures ----
static void net(mil_context *ctx, mil_status *status, mil_real *result)
{
    static mil_real data[24];
    static const mil_real weight[8] = { 1, -1, 2, 0, 1, 1, -2, 1 };
    static const int64_t label[2] = { 1, 0 };
    const int64_t two = 2, shape[2] = { 3, 4 };
    for (int i = 0; i < 24; i++) data[i] = (mil_real)(i % 7 - 3);
    mil_tensor t = mil_tensor_make(data, MIL_REAL_DTYPE, 2, shape), w = mil_tensor_matrix(weight, MIL_REAL_DTYPE, 2, 4), l = mil_tensor_make(label, MIL_I64, 1, &two);
    t.stride[0] = 6 * (int64_t)sizeof(mil_real);           // rows with a gap
    t.stride[1] = (int64_t)sizeof(mil_real);
    mil_tape *tape = NULL;
    *status = mil_tape_create(ctx, &tape);
    if (*status != MIL_OK) return;
    mil_node *x = mil_input(tape, "x", &t), *weights = mil_input(tape, "w", &w), *unused = mil_input(tape, "later", &w);
    mil_node_want_grad(weights);
    mil_node *h = mil_tanh(mil_linear(x, weights, NULL));                        // [3, 2]
    mil_node_keep(h);
    *status = mil_tape_run(tape);
    if (*status == MIL_OK) {                               // a second stage reads inputs of the first, and one that the first had no use for
        mil_node *z = mil_softmax_pool(h, mil_linear(x, unused, NULL)), *y = mil_sum(mil_mul(mil_gather(z, mil_input(tape, "l", &l), 0), mil_slice(weights, 1, 0, 2)), 0);
        mil_tape_backward(tape, mil_sum_all(mil_square(y)));
        mil_node *g = mil_node_grad(weights);
        mil_node_keep(y);
        mil_node_keep(g);
        *status = mil_tape_run(tape);
        if (*status == MIL_OK) *status = mil_tape_rerun(tape);
        if (*status == MIL_OK) *status = mil_node_read(y, result, 2);
        if (*status == MIL_OK) *status = mil_node_read(g, result + 2, 8);
    }
    mil_tape_free(tape);
}

TEST(stages_strides_and_reruns_work_on_a_backend)
{
    mil_status status;
    mil_real expected[10], got[10];
    mil_context *ctx = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK);
    net(ctx, &status, expected);
    CHECK(status == MIL_OK);
    mil_context_free(ctx);
    for (int k = 0; k < 2; k++) {
        ctx = context_on(k ? &apart : &shared);
        net(ctx, &status, got);
        if (!CHECK(status == MIL_OK)) puts(mil_error(ctx));
        else for (int i = 0; i < 10; i++) CHECK_NEAR(got[i], expected[i], MIL_REAL_IS_FLOAT ? 1e-5 : 1e-12);
        CHECK(the_device.live == 0);
        mil_context_free(ctx);
    }
}

// What a run needs of the inputs is sent once, what it does not need never.
TEST(an_input_is_sent_to_the_backend_once_and_when_it_is_needed)
{
    static const mil_real data[2][6] = { { 1, -2, 3, -4, 5, -6 }, { 0 } };
    mil_context *ctx = context_on(&apart);
    mil_tape *tape = NULL;
    mil_real y[6];
    CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
    const mil_tensor a = mil_tensor_matrix(data[0], MIL_REAL_DTYPE, 2, 3), b = mil_tensor_matrix(data[1], MIL_REAL_DTYPE, 2, 3);
    mil_node *in = mil_input(tape, "a", &a), *spare = mil_input(tape, "b", &b), *first = mil_relu(in);
    mil_node_keep(first);
    CHECK(mil_tape_run(tape) == MIL_OK && the_device.uploads == 1);
    mil_node *second = mil_square(in);
    mil_node_keep(second);
    CHECK(mil_tape_run(tape) == MIL_OK && the_device.uploads == 1);
    CHECK(mil_node_read(second, y, 6) == MIL_OK && y[5] == 36);
    mil_node *third = mil_add(spare, second);
    mil_node_keep(third);
    CHECK(mil_tape_run(tape) == MIL_OK && the_device.uploads == 2);
    CHECK(mil_node_read(third, y, 6) == MIL_OK && y[1] == 4);
    mil_tape_free(tape);
    mil_context_free(ctx);
    CHECK(the_device.live == 0);
}

TEST(every_failure_of_a_backend_is_an_error)
{
    int failures = 0;
    for (int k = 1; k < 500; k++) {
        mil_status status;
        mil_real got[10];
        mil_context *ctx = context_on(&apart);
        the_device.fail_at = k;
        net(ctx, &status, got);
        const int done = the_device.calls < k;
        CHECK(done ? status == MIL_OK : status == MIL_ERROR_BACKEND || status == MIL_ERROR_NO_MEMORY);
        if (!done) CHECK_CONTAINS(mil_error(ctx), "backend far: ");
        failures += !done;
        CHECK(the_device.live == 0);
        mil_context_free(ctx);
        if (done) break;
    }
    CHECK(failures > 20);
}

TESTS(T(an_input_is_sent_to_the_backend_once_and_when_it_is_needed) T(a_backend_in_host_memory_runs_every_case) T(a_backend_with_memory_of_its_own_runs_every_case)
      T(a_backend_that_supports_nothing_falls_back_for_every_case) T(stages_strides_and_reruns_work_on_a_backend)
      T(every_failure_of_a_backend_is_an_error))
