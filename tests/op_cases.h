// One row per way of calling an op: how to record it, and a reference written out plainly in double. test_ops runs the rows on
// every CPU tier, test_backend on a backend that is not the CPU. An op is added by one row in op_cases_fill.
#ifndef OP_CASES_H
#define OP_CASES_H
#include <stdlib.h>
#include <string.h>
#include "check.h"

// ---- arrays of double ----
typedef struct array { int rank; int64_t shape[MIL_MAX_RANK], count; double *v; } array;

static array array_new(int rank, const int64_t *shape)
{
    array a;
    a.rank = rank;
    a.count = 1;
    for (int i = 0; i < rank; i++) {
        a.shape[i] = shape[i];
        a.count *= shape[i];
    }
    a.v = (double *)calloc((size_t)a.count + 1, sizeof *a.v);
    return a;
}

static void unravel(int rank, const int64_t *shape, int64_t at, int64_t *coordinate)
{
    for (int i = rank - 1; i >= 0; i--) {
        coordinate[i] = at % shape[i];
        at /= shape[i];
    }
}

// a's element under coordinate [rank], aligned at the end, length 1 repeated.
static const double *array_at(const array *a, int rank, const int64_t *coordinate)
{
    int64_t at = 0;
    for (int i = 0; i < a->rank; i++) at = at * a->shape[i] + (a->shape[i] == 1 ? 0 : coordinate[i + rank - a->rank]);
    return a->v + at;
}
static double array_under(const array *a, int rank, const int64_t *coordinate) { return *array_at(a, rank, coordinate); }

static int read_shape(const char *text, int64_t *shape, const char **end)
{
    int rank = 0;
    while ((*text >= '0' && *text <= '9') || *text == '-') {
        char *rest;
        shape[rank++] = strtol(text, &rest, 10);
        text = *rest == ',' ? rest + 1 : rest;
    }
    if (end) *end = text;
    return rank;
}

// ---- cases ----
enum { CASE_INPUTS = 20 };
typedef struct op_case op_case;
struct op_case {
    const char *name;
    const char *inputs;      // a word per input: n any, p positive, m mask of 0 and 1, iK: index below K; then the shape "2,3"
    mil_node *(*record)(const op_case *c, mil_tape *tape, mil_node **x, const mil_tensor *t, int count);
    array (*reference)(const op_case *c, const array *x, int count);
    double a, b;             // the op's numbers
    int i[4];                // its axis and the like
    const char *shape;       // its target shape
    int cut;                 // 1: no gradient passes
    double (*f)(double x, double y, double a, double b);               // of elementwise ops
    mil_node *(*binary)(mil_node *a, mil_node *b);
    mil_node *(*unary)(mil_node *x);
};

static double case_random(uint64_t *state)                             // in [0, 1)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 11) * (1.0 / 9007199254740992.0);
}

// The inputs of a case. Values lie on a shuffled grid, so that no two are close: maxima have no ties, and 0 is not among them.
static int case_inputs(const op_case *c, array *x, char *letter)
{
    int count = 0;
    uint64_t state = 12345;
    for (const char *at = c->inputs; *at; ) {
        int64_t shape[MIL_MAX_RANK], bound = 0;
        const char kind = *at++;
        if (kind == 'i') { bound = strtol(at, NULL, 10); at = strchr(at, ':') + 1; }
        const int rank = read_shape(at, shape, &at);
        array a = array_new(rank, shape);
        for (int64_t i = 0; i < a.count; i++) {
            const double place = ((double)i + 0.25 + 0.5 * case_random(&state)) / (double)a.count;
            a.v[i] = kind == 'n' ? 4 * place - 2 : kind == 'p' ? 0.5 + 1.5 * place : 0;
            if (kind == 'n' && fabs(a.v[i]) < 0.01) a.v[i] = 0.05;
            if (kind == 'm') a.v[i] = case_random(&state) < 0.7;
            if (kind == 'i') a.v[i] = floor(case_random(&state) * (double)bound);
        }
        for (int64_t i = a.count - 1; i > 0; i--) {
            const int64_t j = (int64_t)(case_random(&state) * (double)(i + 1));
            const double t = a.v[i];
            a.v[i] = a.v[j];
            a.v[j] = t;
        }
        letter[count] = kind;
        x[count++] = a;
        while (*at == ' ') at++;
    }
    return count;
}

// ---- references ----
static array ref_elementwise(const op_case *c, const array *x, int count)
{
    int64_t shape[MIL_MAX_RANK], at[MIL_MAX_RANK];
    int rank = 0;
    for (int k = 0; k < count; k++) if (x[k].rank > rank) rank = x[k].rank;
    for (int i = 0; i < rank; i++) shape[i] = 1;
    for (int k = 0; k < count; k++)
        for (int i = 0; i < x[k].rank; i++) if (x[k].shape[i] != 1) shape[i + rank - x[k].rank] = x[k].shape[i];
    array y = array_new(rank, shape);
    for (int64_t e = 0; e < y.count; e++) {
        unravel(rank, shape, e, at);
        y.v[e] = c->f(array_under(&x[0], rank, at), count > 1 ? array_under(&x[1], rank, at) : 0, c->a, c->b);
    }
    return y;
}

static array ref_to_shape(const op_case *c, const array *x, int count)           // reshape, detach; broadcast
{
    int64_t shape[MIL_MAX_RANK], at[MIL_MAX_RANK], known = 1;
    const int rank = read_shape(c->shape, shape, NULL);
    (void)count;
    for (int i = 0; i < rank; i++) if (shape[i] > 0) known *= shape[i];
    for (int i = 0; i < rank; i++) if (shape[i] < 0) shape[i] = x->count / known;
    array y = array_new(rank, shape);
    for (int64_t e = 0; e < y.count; e++) {
        unravel(rank, shape, e, at);
        y.v[e] = y.count == x->count ? x->v[e] : array_under(x, rank, at);
    }
    return y;
}

static array ref_sum_to(const op_case *c, const array *x, int count)
{
    int64_t shape[MIL_MAX_RANK], at[MIL_MAX_RANK];
    const int rank = read_shape(c->shape, shape, NULL);
    (void)count;
    array y = array_new(rank, shape);
    for (int64_t e = 0; e < x->count; e++) {
        int64_t to = 0;
        unravel(x->rank, x->shape, e, at);
        for (int i = 0; i < rank; i++) to = to * shape[i] + (shape[i] == 1 ? 0 : at[i + x->rank - rank]);
        y.v[to] += x->v[e];
    }
    return y;
}

static array ref_permute(const op_case *c, const array *x, int count)
{
    int64_t shape[MIL_MAX_RANK], at[MIL_MAX_RANK], from[MIL_MAX_RANK];
    (void)count;
    for (int i = 0; i < x->rank; i++) shape[i] = x->shape[c->i[i]];
    array y = array_new(x->rank, shape);
    for (int64_t e = 0; e < y.count; e++) {
        unravel(y.rank, shape, e, at);
        for (int i = 0; i < y.rank; i++) from[c->i[i]] = at[i];
        y.v[e] = array_under(x, x->rank, from);
    }
    return y;
}

static array ref_transpose(const op_case *c, const array *x, int count)
{
    op_case p = *c;
    for (int i = 0; i < x->rank; i++) p.i[i] = i;
    p.i[x->rank - 1] = x->rank - 2;
    p.i[x->rank - 2] = x->rank - 1;
    return ref_permute(&p, x, count);
}

// Axis i[0] counted from the front, and what lies around it: element (o, j, k) stands at (o n + j) inner + k.
static int case_axis(const op_case *c, const array *x, int64_t *outer, int64_t *n, int64_t *inner)
{
    const int axis = c->i[0] < 0 ? c->i[0] + x->rank : c->i[0];
    *outer = *inner = 1;
    *n = x->shape[axis];
    for (int i = 0; i < axis; i++) *outer *= x->shape[i];
    for (int i = axis + 1; i < x->rank; i++) *inner *= x->shape[i];
    return axis;
}

static array ref_concat(const op_case *c, const array *x, int count)
{
    int64_t shape[MIL_MAX_RANK] = { 0 }, outer, n, inner, total = 0, before = 0;
    const int axis = case_axis(c, x, &outer, &n, &inner);
    for (int k = 0; k < count; k++) total += x[k].shape[axis];
    for (int i = 0; i < x->rank; i++) shape[i] = i == axis ? total : x->shape[i];
    array y = array_new(x->rank, shape);
    for (int k = 0; k < count; before += x[k++].shape[axis])
        for (int64_t o = 0; o < outer; o++)
            for (int64_t j = 0; j < x[k].shape[axis]; j++)
                for (int64_t i = 0; i < inner; i++) y.v[(o * total + before + j) * inner + i] = x[k].v[(o * x[k].shape[axis] + j) * inner + i];
    return y;
}

// slice: i = axis, start, length. pad: i = axis, before, after.
static array ref_slice_or_pad(const op_case *c, const array *x, int pad)
{
    int64_t shape[MIL_MAX_RANK], outer, n, inner;
    const int axis = case_axis(c, x, &outer, &n, &inner);
    const int64_t length = pad ? c->i[1] + n + c->i[2] : c->i[2], shift = pad ? -c->i[1] : c->i[1];
    for (int i = 0; i < x->rank; i++) shape[i] = i == axis ? length : x->shape[i];
    array y = array_new(x->rank, shape);
    for (int64_t o = 0; o < outer; o++)
        for (int64_t j = 0; j < length; j++)
            for (int64_t i = 0; i < inner; i++)
                y.v[(o * length + j) * inner + i] = j + shift < 0 || j + shift >= n ? 0 : x->v[(o * n + j + shift) * inner + i];
    return y;
}
static array ref_slice(const op_case *c, const array *x, int count) { (void)count; return ref_slice_or_pad(c, x, 0); }
static array ref_pad(const op_case *c, const array *x, int count) { (void)count; return ref_slice_or_pad(c, x, 1); }

// i = axis, kind: 0 sum, 1 mean, 2 max, 3 min, 4 logsumexp, 5 argmax
static array ref_reduce(const op_case *c, const array *x, int count)
{
    int64_t shape[MIL_MAX_RANK], outer, n, inner;
    const int axis = case_axis(c, x, &outer, &n, &inner);
    (void)count;
    for (int i = 0; i < x->rank; i++) shape[i] = i == axis ? 1 : x->shape[i];
    array y = array_new(x->rank, shape);
    for (int64_t o = 0; o < outer; o++)
        for (int64_t i = 0; i < inner; i++) {
            double sum = 0, top = -HUGE_VAL, low = HUGE_VAL, place = 0, exps = 0;
            for (int64_t j = 0; j < n; j++) {
                const double v = x->v[(o * n + j) * inner + i];
                sum += v;
                if (v > top) { top = v; place = (double)j; }
                if (v < low) low = v;
            }
            for (int64_t j = 0; j < n; j++) exps += exp(x->v[(o * n + j) * inner + i] - top);
            const double result[6] = { sum, sum / (double)n, top, low, top + log(exps), place };
            y.v[o * inner + i] = result[c->i[1]];
        }
    return y;
}

static array ref_sum_all(const op_case *c, const array *x, int count)
{
    array y = array_new(0, NULL);
    (void)c, (void)count;
    for (int64_t e = 0; e < x->count; e++) y.v[0] += x->v[e];
    return y;
}

// i = axis, 1: the logarithm
static array ref_softmax(const op_case *c, const array *x, int count)
{
    int64_t outer, n, inner;
    array y = array_new(x->rank, x->shape);
    (void)count;
    case_axis(c, x, &outer, &n, &inner);
    for (int64_t o = 0; o < outer; o++)
        for (int64_t i = 0; i < inner; i++) {
            double sum = 0;
            for (int64_t j = 0; j < n; j++) sum += exp(x->v[(o * n + j) * inner + i]);
            for (int64_t j = 0; j < n; j++) {
                const double v = x->v[(o * n + j) * inner + i];
                y.v[(o * n + j) * inner + i] = c->i[1] ? v - log(sum) : exp(v) / sum;
            }
        }
    return y;
}

// i = transpose a, transpose b
static array ref_matmul(const op_case *c, const array *x, int count)
{
    const array *a = &x[0], *b = &x[1];
    const int rank = a->rank > b->rank ? a->rank : b->rank, ta = c->i[0], tb = c->i[1];
    int64_t shape[MIL_MAX_RANK], at[MIL_MAX_RANK], in_a[MIL_MAX_RANK], in_b[MIL_MAX_RANK];
    (void)count;
    for (int i = 0; i < rank - 2; i++) {
        const int64_t la = i + a->rank - rank >= 0 ? a->shape[i + a->rank - rank] : 1, lb = i + b->rank - rank >= 0 ? b->shape[i + b->rank - rank] : 1;
        shape[i] = la > lb ? la : lb;
    }
    shape[rank - 2] = a->shape[a->rank - (ta ? 1 : 2)];
    shape[rank - 1] = b->shape[b->rank - (tb ? 2 : 1)];
    const int64_t depth = a->shape[a->rank - (ta ? 2 : 1)];
    array y = array_new(rank, shape);
    for (int64_t e = 0; e < y.count; e++) {
        unravel(rank, shape, e, at);
        memcpy(in_a, at, sizeof at);
        memcpy(in_b, at, sizeof at);
        in_a[rank - 2] = ta ? 0 : at[rank - 2];
        in_a[rank - 1] = ta ? at[rank - 2] : 0;
        in_b[rank - 2] = tb ? at[rank - 1] : 0;
        in_b[rank - 1] = tb ? 0 : at[rank - 1];
        if (depth == 0) continue;
        const double *pa = array_at(a, rank, in_a), *pb = array_at(b, rank, in_b);
        const int64_t step_a = ta ? a->shape[a->rank - 1] : 1, step_b = tb ? 1 : b->shape[b->rank - 1];
        for (int64_t k = 0; k < depth; k++) y.v[e] += pa[k * step_a] * pb[k * step_b];
    }
    return y;
}

static array ref_linear(const op_case *c, const array *x, int count)            // x [.., in], weight [out, in], bias [out]
{
    const int64_t out = x[1].shape[0], in = x[1].shape[1];
    int64_t shape[MIL_MAX_RANK];
    (void)c;
    memcpy(shape, x->shape, sizeof shape);
    shape[x->rank - 1] = out;
    array y = array_new(x->rank, shape);
    for (int64_t e = 0; e < y.count; e++) {
        y.v[e] = count > 2 ? x[2].v[e % out] : 0;
        for (int64_t k = 0; k < in; k++) y.v[e] += x[0].v[e / out * in + k] * x[1].v[e % out * in + k];
    }
    return y;
}

static array ref_softmax_pool(const op_case *c, const array *x, int count)
{
    const array *s = &x[0], *v = &x[1];
    const int64_t K = s->shape[s->rank - 1], E = v->shape[v->rank - 1], N = s->shape[s->rank - 2], B = s->count / (N * K);
    int64_t shape[MIL_MAX_RANK];
    (void)c, (void)count;
    memcpy(shape, s->shape, sizeof shape);
    shape[s->rank - 2] = K;
    shape[s->rank - 1] = E;
    array y = array_new(s->rank, shape);
    for (int64_t b = 0; b < B; b++)
        for (int64_t k = 0; k < K; k++) {
            double sum = 0;
            for (int64_t n = 0; n < N; n++) sum += exp(s->v[(b * N + n) * K + k]);
            for (int64_t n = 0; n < N; n++)
                for (int64_t e = 0; e < E; e++) y.v[(b * K + k) * E + e] += exp(s->v[(b * N + n) * K + k]) / sum * v->v[(b * N + n) * E + e];
        }
    return y;
}

static array ref_layer_norm(const op_case *c, const array *x, int count)
{
    const int64_t E = x->shape[x->rank - 1];
    array y = array_new(x->rank, x->shape);
    for (int64_t r = 0; r < x->count / E; r++) {
        double mean = 0, var = 0;
        for (int64_t j = 0; j < E; j++) mean += x->v[r * E + j] / (double)E;
        for (int64_t j = 0; j < E; j++) var += (x->v[r * E + j] - mean) * (x->v[r * E + j] - mean) / (double)E;
        for (int64_t j = 0; j < E; j++) {
            const double h = (x->v[r * E + j] - mean) / sqrt(var + c->a);
            y.v[r * E + j] = count > 1 ? h * x[1].v[j] + x[2].v[j] : h;
        }
    }
    return y;
}

static array ref_gather(const op_case *c, const array *x, int count)
{
    int64_t shape[MIL_MAX_RANK], outer, n, inner;
    const int axis = case_axis(c, x, &outer, &n, &inner);
    const int64_t k = x[1].count;
    (void)count;
    memcpy(shape, x->shape, sizeof shape);
    shape[axis] = k;
    array y = array_new(x->rank, shape);
    for (int64_t o = 0; o < outer; o++)
        for (int64_t j = 0; j < k; j++)
            for (int64_t i = 0; i < inner; i++) y.v[(o * k + j) * inner + i] = x->v[(o * n + (int64_t)x[1].v[j]) * inner + i];
    return y;
}

static array ref_scatter_add(const op_case *c, const array *x, int count)        // i = axis, length
{
    int64_t shape[MIL_MAX_RANK], outer, k, inner;
    const int axis = case_axis(c, x, &outer, &k, &inner);
    const int64_t n = c->i[1];
    (void)count;
    memcpy(shape, x->shape, sizeof shape);
    shape[axis] = n;
    array y = array_new(x->rank, shape);
    for (int64_t o = 0; o < outer; o++)
        for (int64_t j = 0; j < k; j++)
            for (int64_t i = 0; i < inner; i++) y.v[(o * n + (int64_t)x[1].v[j]) * inner + i] += x->v[(o * k + j) * inner + i];
    return y;
}

static array ref_one_hot(const op_case *c, const array *x, int count)            // i = classes
{
    int64_t shape[MIL_MAX_RANK];
    (void)count;
    memcpy(shape, x->shape, sizeof shape);
    shape[x->rank] = c->i[0];
    array y = array_new(x->rank + 1, shape);
    for (int64_t e = 0; e < x->count; e++) y.v[e * c->i[0] + (int64_t)x->v[e]] = 1;
    return y;
}

// ---- recording ----
#define RECORD(name, call)                                                                                                           \
    static mil_node *rec_##name(const op_case *c, mil_tape *tape, mil_node **x, const mil_tensor *t, int count)                      \
    {                                                                                                                                \
        int64_t shape[MIL_MAX_RANK];                                                                                                 \
        const int rank = c->shape ? read_shape(c->shape, shape, NULL) : 0;                                                           \
        (void)c, (void)tape, (void)x, (void)t, (void)count, (void)rank, (void)shape;                                                 \
        return call;                                                                                                                 \
    }
RECORD(unary, c->unary(x[0]))
RECORD(binary, c->binary(x[0], x[1]))
RECORD(leaky_relu, mil_leaky_relu(x[0], c->a))
RECORD(clamp, mil_clamp(x[0], c->a, c->b))
RECORD(affine, mil_affine(x[0], c->a, c->b))
RECORD(mask_fill, mil_mask_fill(x[0], x[1], c->a))
RECORD(reshape, mil_reshape(x[0], rank, shape))
RECORD(detach, mil_detach(x[0]))
RECORD(broadcast, mil_broadcast(x[0], rank, shape))
RECORD(sum_to, mil_sum_to(x[0], rank, shape))
RECORD(permute, mil_permute(x[0], c->i))
RECORD(transpose, mil_transpose(x[0]))
RECORD(concat, mil_concat(x, count, c->i[0]))
RECORD(slice, mil_slice(x[0], c->i[0], c->i[1], c->i[2]))
RECORD(pad, mil_pad(x[0], c->i[0], c->i[1], c->i[2]))
RECORD(sum, mil_sum(x[0], c->i[0]))
RECORD(mean, mil_mean(x[0], c->i[0]))
RECORD(max, mil_max(x[0], c->i[0]))
RECORD(min, mil_min(x[0], c->i[0]))
RECORD(logsumexp, mil_logsumexp(x[0], c->i[0]))
RECORD(argmax, mil_argmax(x[0], c->i[0]))
RECORD(sum_all, mil_sum_all(x[0]))
RECORD(softmax, mil_softmax(x[0], c->i[0]))
RECORD(log_softmax, mil_log_softmax(x[0], c->i[0]))
RECORD(matmul, mil_matmul_t(x[0], x[1], c->i[0], c->i[1]))
RECORD(linear, mil_linear(x[0], x[1], count > 2 ? x[2] : NULL))
RECORD(softmax_pool, mil_softmax_pool(x[0], x[1]))
RECORD(layer_norm, mil_layer_norm(x[0], count > 1 ? x[1] : NULL, count > 1 ? x[2] : NULL, c->a))
RECORD(gather, mil_gather(x[0], x[1], c->i[0]))
RECORD(scatter_add, mil_scatter_add(x[0], x[1], c->i[0], c->i[1]))
RECORD(one_hot, mil_one_hot(x[0], c->i[0]))
RECORD(dropout, (mil_tape_draw(tape, "drop", &t[1]), mil_dropout(x[0], c->a, "drop")))
RECORD(constant, mil_add(mil_constant(tape, x[0]->rank, x[0]->shape, c->a), x[0]))

#define FORMULA(name, expression) \
    static double f_##name(double x, double y, double a, double b) { (void)x, (void)y, (void)a, (void)b; return expression; }
FORMULA(exp, exp(x))
FORMULA(log, log(x))
FORMULA(sqrt, sqrt(x))
FORMULA(square, x * x)
FORMULA(abs, fabs(x))
FORMULA(reciprocal, 1 / x)
FORMULA(tanh, tanh(x))
FORMULA(sigmoid, 1 / (1 + exp(-x)))
FORMULA(relu, x > 0 ? x : 0)
FORMULA(gelu, x / 2 * (1 + erf(x / sqrt(2.0))))
FORMULA(silu, x / (1 + exp(-x)))
FORMULA(softplus, log(1 + exp(x)))
FORMULA(leaky_relu, x > 0 ? x : a * x)
FORMULA(clamp, x < a ? a : x > b ? b : x)
FORMULA(affine, a * x + b)
FORMULA(add, x + y)
FORMULA(sub, x - y)
FORMULA(mul, x * y)
FORMULA(div, x / y)
FORMULA(maximum, x > y ? x : y)
FORMULA(minimum, x < y ? x : y)
FORMULA(mask_fill, y != 0 ? x : a)
FORMULA(dropout, y != 0 ? x / (1 - a) : 0)
FORMULA(plus_a, x + a)

// ---- the table ----
static op_case op_cases[1024];
static int op_case_count;

static op_case *op_case_add(const char *name, const char *inputs, mil_node *(*record)(const op_case *, mil_tape *, mil_node **, const mil_tensor *, int),
                            array (*reference)(const op_case *, const array *, int))
{
    op_case *c = &op_cases[op_case_count++];
    memset(c, 0, sizeof *c);
    c->name = name;
    c->inputs = inputs;
    c->record = record;
    c->reference = reference;
    return c;
}

static void op_case_elementwise(const char *name, const char *inputs, mil_node *(*record)(const op_case *, mil_tape *, mil_node **, const mil_tensor *, int),
                                double (*f)(double, double, double, double), double a, double b)
{
    op_case *c = op_case_add(name, inputs, record, ref_elementwise);
    c->f = f;
    c->a = a;
    c->b = b;
}

static op_case *op_case_axes(const char *name, const char *inputs, mil_node *(*record)(const op_case *, mil_tape *, mil_node **, const mil_tensor *, int),
                             array (*reference)(const op_case *, const array *, int), int i0, int i1, int i2, int i3)
{
    op_case *c = op_case_add(name, inputs, record, reference);
    c->i[0] = i0;
    c->i[1] = i1;
    c->i[2] = i2;
    c->i[3] = i3;
    return c;
}

static void op_cases_fill(void)
{
    // Around the tile of 128 rows and the wave of 4096.
    static const char *const lengths[] = { "n1,3", "n2,3", "n127,2", "n128,2", "n129,2", "n300,1", "n4095,1", "n4096,1", "n4097,1", "n4097,3" };
    static const char *const shapes[] = { "n", "n5", "n3,7", "n2,3,4", "n1,1,1", "n2,0,3", "n130,33" };
    static const char *const positive[] = { "p", "p5", "p3,7", "p2,3,4", "p1,1,1", "p2,0,3", "p130,33" };
    static const char *const pairs[] = {             // the second is positive, so that div may have it
        "n3,7 p3,7", "n3,7 p7", "n3,7 p1,7", "n3,7 p3,1", "n3,1 p1,7", "n1,7 p3,1", "n7 p3,7", "n3,7 p", "n p3,7", "n p", "n5 p5", "n5 p1", "n1 p5",
        "n2,3,4 p2,3,4", "n2,3,4 p2,1,4", "n2,1,4 p2,3,4", "n2,3,4 p2,3,1", "n2,3,4 p1,3,4", "n2,3,4 p3,4", "n2,3,4 p4", "n2,3,4 p3,1", "n2,3,4 p2,1,1",
        "n2,1,4 p3,1", "n2,3,1 p1,4", "n1,3,4 p1,1,4", "n1,3,4 p3,1", "n2,2,3,4 p2,1,3,1", "n2,1,3,1 p2,1,4", "n129,3 p1,3", "n129,3 p129,1", "n129,1 p1,3",
        "n1,129,3 p1,1,3", "n2,129,3 p2,1,3", "n4097,1 p1,1", "n1,1 p4097,2", "n130,33 p130,33", "n2,0,3 p2,1,3"
    };
    int k;
    op_case_count = 0;
#define EACH(list) for (k = 0; k < (int)(sizeof list / sizeof *list); k++)
#define UNARY(name, list) EACH(list) { op_case_elementwise(#name, list[k], rec_unary, f_##name, 0, 0); op_cases[op_case_count - 1].unary = mil_##name; }
    UNARY(exp, shapes) UNARY(log, positive) UNARY(sqrt, positive) UNARY(square, shapes) UNARY(abs, shapes) UNARY(reciprocal, positive)
    UNARY(tanh, shapes) UNARY(sigmoid, shapes) UNARY(relu, shapes) UNARY(gelu, shapes) UNARY(silu, shapes) UNARY(softplus, shapes)
    UNARY(tanh, lengths)
    EACH(shapes) op_case_elementwise("leaky_relu", shapes[k], rec_leaky_relu, f_leaky_relu, 0.2, 0);
    EACH(shapes) op_case_elementwise("clamp", shapes[k], rec_clamp, f_clamp, -0.7, 1.1);
    EACH(shapes) op_case_elementwise("affine", shapes[k], rec_affine, f_affine, -1.3, 0.4);
    EACH(shapes) op_case_elementwise("constant", shapes[k], rec_constant, f_plus_a, 0.3, 0);
#define BINARY(name) EACH(pairs) { op_case_elementwise(#name, pairs[k], rec_binary, f_##name, 0, 0); op_cases[op_case_count - 1].binary = mil_##name; }
    BINARY(add) BINARY(sub) BINARY(mul) BINARY(div) BINARY(maximum) BINARY(minimum)

    static const char *const masked[] = { "n m", "n5 m5", "n3,7 m3,7", "n3,7 m7", "n3,7 m3,1", "n2,3,4 m2,3,1", "n2,3,4 m2,1,4", "n1,200,3 m200,1" };
    EACH(masked) op_case_elementwise("mask_fill", masked[k], rec_mask_fill, f_mask_fill, -3.5, 0);
    static const char *const dropped[] = { "n5 m5", "n3,7 m3,7", "n2,130,4 m2,130,4" };
    EACH(dropped) op_case_elementwise("dropout", dropped[k], rec_dropout, f_dropout, 0.25, 0);

#define SHAPED(op, in, to) op_case_add(#op, in, rec_##op, ref_##op)->shape = to
#define ref_reshape ref_to_shape
#define ref_broadcast ref_to_shape
    SHAPED(reshape, "n2,3,4", "6,4"); SHAPED(reshape, "n2,3,4", "24"); SHAPED(reshape, "n2,3,4", "4,-1,2"); SHAPED(reshape, "n", "1,1"); SHAPED(reshape, "n1,1", "");
    SHAPED(reshape, "n2,0", "0,5"); SHAPED(reshape, "n300,2", "2,300");
    SHAPED(broadcast, "n", "3,2"); SHAPED(broadcast, "n4", "3,4"); SHAPED(broadcast, "n3,1", "3,4"); SHAPED(broadcast, "n1,4", "3,4");
    SHAPED(broadcast, "n2,1,4", "2,3,4"); SHAPED(broadcast, "n3,1", "2,3,4"); SHAPED(broadcast, "n1,1,3", "1,200,3"); SHAPED(broadcast, "n2,1,1,2", "2,3,2,2");
    SHAPED(sum_to, "n3,2", ""); SHAPED(sum_to, "n3,4", "4"); SHAPED(sum_to, "n3,4", "1,4"); SHAPED(sum_to, "n3,4", "3,1"); SHAPED(sum_to, "n3,4", "1");
    SHAPED(sum_to, "n2,3,4", "2,1,4"); SHAPED(sum_to, "n2,3,4", "3,1"); SHAPED(sum_to, "n2,3,4", "2,3,4"); SHAPED(sum_to, "n2,3,4", "1,3,4"); SHAPED(sum_to, "n5", "");
    SHAPED(sum_to, "n2,300,3", "3"); SHAPED(sum_to, "n2,2,3,4", "2,1,3,1"); SHAPED(sum_to, "n4097,2", "1,2");
    op_case_add("detach", "n3,4", rec_detach, ref_to_shape)->shape = "3,4";
    op_cases[op_case_count - 1].cut = 1;

    op_case_axes("permute", "n2,3,4", rec_permute, ref_permute, 2, 0, 1, 0); op_case_axes("permute", "n2,3,4", rec_permute, ref_permute, 0, 2, 1, 0);
    op_case_axes("permute", "n2,3,4", rec_permute, ref_permute, 1, 0, 2, 0); op_case_axes("permute", "n1,3,1,2", rec_permute, ref_permute, 2, 1, 0, 3);
    op_case_axes("permute", "n2,3,2,2", rec_permute, ref_permute, 3, 1, 0, 2); op_case_axes("permute", "n2,3", rec_permute, ref_permute, 0, 1, 0, 0);
    op_case_add("transpose", "n3,5", rec_transpose, ref_transpose); op_case_add("transpose", "n2,3,5", rec_transpose, ref_transpose);
    op_case_add("transpose", "n1,5", rec_transpose, ref_transpose); op_case_add("transpose", "n300,2", rec_transpose, ref_transpose);
    op_case_add("transpose", "n3,0", rec_transpose, ref_transpose); op_case_add("transpose", "n400,300", rec_transpose, ref_transpose);

    op_case_axes("concat", "n2,3 n4,3", rec_concat, ref_concat, 0, 0, 0, 0); op_case_axes("concat", "n2,3 n2,1 n2,4", rec_concat, ref_concat, 1, 0, 0, 0);
    op_case_axes("concat", "n2,3,2 n2,1,2", rec_concat, ref_concat, -2, 0, 0, 0); op_case_axes("concat", "n3 n2", rec_concat, ref_concat, -1, 0, 0, 0);
    op_case_axes("concat", "n3,2", rec_concat, ref_concat, 0, 0, 0, 0); op_case_axes("concat", "n2,0 n2,3", rec_concat, ref_concat, 1, 0, 0, 0);
    op_case_axes("concat", "n1,2 n2,2 n1,2 n1,2 n3,2 n1,2 n1,2 n1,2 n1,2 n2,2 n1,2", rec_concat, ref_concat, 0, 0, 0, 0);
    op_case_axes("concat", "n2,1 n2,2 n2,1 n2,1 n2,3 n2,1 n2,1 n2,1 n2,1", rec_concat, ref_concat, 1, 0, 0, 0);
    op_case_axes("concat", "n200,1 n200,2", rec_concat, ref_concat, 1, 0, 0, 0); op_case_axes("concat", "n200,2 n1,2", rec_concat, ref_concat, 0, 0, 0, 0);
    for (k = -3; k < 3; k++) {
        op_case_axes("slice", "n3,4,5", rec_slice, ref_slice, k, 1, 2, 0);
        op_case_axes("slice", "n3,4,5", rec_slice, ref_slice, k, 0, 3, 0);
        op_case_axes("slice", "n3,4,5", rec_slice, ref_slice, k, 2, 0, 0);
        op_case_axes("pad", "n3,4,5", rec_pad, ref_pad, k, 1, 2, 0);
        op_case_axes("pad", "n3,4,5", rec_pad, ref_pad, k, 0, 1, 0);
    }
    op_case_axes("slice", "n300,5", rec_slice, ref_slice, 0, 130, 129, 0); op_case_axes("slice", "n300,5", rec_slice, ref_slice, 1, 3, 2, 0);
    op_case_axes("pad", "n300,2", rec_pad, ref_pad, 0, 1, 0, 0); op_case_axes("pad", "n300,2", rec_pad, ref_pad, 1, 1, 1, 0); op_case_axes("pad", "n4", rec_pad, ref_pad, 0, 2, 2, 0);

    static const char *const reduced[] = { "n2,3,4", "n1,5,3", "n3,1,2" };
#define REDUCTION(name, kind)                                                                                                        \
    for (int axis = -3; axis < 3; axis++) EACH(reduced) op_case_axes(#name, reduced[k], rec_##name, ref_reduce, axis, kind, 0, 0)->cut = kind == 5; \
    EACH(lengths) op_case_axes(#name, lengths[k], rec_##name, ref_reduce, 0, kind, 0, 0)->cut = kind == 5;                            \
    op_case_axes(#name, "n1,4097,2", rec_##name, ref_reduce, 1, kind, 0, 0)->cut = kind == 5;                                         \
    op_case_axes(#name, "n2,300,2", rec_##name, ref_reduce, 1, kind, 0, 0)->cut = kind == 5;                                          \
    op_case_axes(#name, "n3,6000", rec_##name, ref_reduce, 0, kind, 0, 0)->cut = kind == 5;                                           \
    op_case_axes(#name, "n200,70", rec_##name, ref_reduce, 1, kind, 0, 0)->cut = kind == 5;                                           \
    op_case_axes(#name, "n6", rec_##name, ref_reduce, 0, kind, 0, 0)->cut = kind == 5
    REDUCTION(sum, 0); REDUCTION(mean, 1); REDUCTION(max, 2); REDUCTION(min, 3); REDUCTION(logsumexp, 4); REDUCTION(argmax, 5);
    op_case_add("sum_all", "n3,4", rec_sum_all, ref_sum_all); op_case_add("sum_all", "n", rec_sum_all, ref_sum_all); op_case_add("sum_all", "n300,3", rec_sum_all, ref_sum_all);
    for (k = -3; k < 3; k++) {
        op_case_axes("softmax", "n2,3,4", rec_softmax, ref_softmax, k, 0, 0, 0);
        op_case_axes("log_softmax", "n2,3,4", rec_log_softmax, ref_softmax, k, 1, 0, 0);
    }
    EACH(lengths) op_case_axes("softmax", lengths[k], rec_softmax, ref_softmax, 0, 0, 0, 0);
    EACH(lengths) op_case_axes("softmax", lengths[k], rec_softmax, ref_softmax, 1, 0, 0, 0);
    op_case_axes("softmax", "n3,4097", rec_softmax, ref_softmax, 1, 0, 0, 0); op_case_axes("softmax", "n5", rec_softmax, ref_softmax, 0, 0, 0, 0);
    op_case_axes("log_softmax", "n1,300,2", rec_log_softmax, ref_softmax, 1, 1, 0, 0);

#define MATMUL(in, ta, tb) op_case_axes("matmul", in, rec_matmul, ref_matmul, ta, tb, 0, 0)
    MATMUL("n3,4 n4,5", 0, 0); MATMUL("n3,4 n5,4", 0, 1); MATMUL("n4,3 n4,5", 1, 0); MATMUL("n4,3 n5,4", 1, 1);
    MATMUL("n2,3,4 n2,4,5", 0, 0); MATMUL("n2,3,4 n2,5,4", 0, 1); MATMUL("n2,4,3 n2,4,5", 1, 0); MATMUL("n2,4,3 n2,5,4", 1, 1);
    MATMUL("n2,3,4 n4,5", 0, 0); MATMUL("n2,3,4 n5,4", 0, 1); MATMUL("n2,4,3 n4,5", 1, 0); MATMUL("n2,4,3 n5,4", 1, 1);
    MATMUL("n3,4 n2,4,5", 0, 0); MATMUL("n3,4 n2,5,4", 0, 1); MATMUL("n4,3 n2,4,5", 1, 0); MATMUL("n4,3 n2,5,4", 1, 1);
    MATMUL("n2,1,3,4 n1,3,4,2", 0, 0); MATMUL("n2,1,4,3 n3,4,2", 1, 0); MATMUL("n1,3,4 n2,4,5", 0, 0); MATMUL("n2,1,3,4 n1,3,2,4", 0, 1); MATMUL("n2,1,4,3 n3,2,4", 1, 1);
    MATMUL("n1,1 n1,1", 0, 0); MATMUL("n200,3 n3,2", 0, 0); MATMUL("n200,3 n200,2", 1, 0); MATMUL("n4097,2 n4097,3", 1, 0); MATMUL("n2,200,3 n2,200,2", 1, 0);
    MATMUL("n300,2 n300,2", 0, 1); MATMUL("n2,200,3 n2,3,200", 0, 0); MATMUL("n300,150 n300,160", 1, 0); MATMUL("n4100,130 n4100,140", 1, 0); MATMUL("n0,3 n0,2", 1, 0);
    MATMUL("n0,3 n3,2", 0, 0);
    op_case_add("linear", "n3,4 n5,4 n5", rec_linear, ref_linear); op_case_add("linear", "n3,4 n5,4", rec_linear, ref_linear);
    op_case_add("linear", "n4 n5,4 n5", rec_linear, ref_linear); op_case_add("linear", "n2,3,4 n5,4 n5", rec_linear, ref_linear);
    op_case_add("linear", "n1,200,7 n9,7 n9", rec_linear, ref_linear); op_case_add("linear", "n4097,3 n2,3 n2", rec_linear, ref_linear);
    op_case_add("linear", "n129,40 n50,40 n50", rec_linear, ref_linear); op_case_add("linear", "n127,3 n1,3 n1", rec_linear, ref_linear);
    op_case_add("linear", "n128,3 n2,3 n2", rec_linear, ref_linear); op_case_add("linear", "n300,300 n260,300 n260", rec_linear, ref_linear);
    op_case_add("linear", "n4096,2 n2,2", rec_linear, ref_linear); op_case_add("linear", "n0,3 n2,3 n2", rec_linear, ref_linear);
    static const char *const pooled[] = { "n5,1 n5,4", "n1,5,1 n1,5,4", "n1,5,3 n1,5,4", "n2,5,1 n2,5,4", "n2,5,3 n2,5,4", "n1,1,1 n1,1,2", "n1,127,1 n1,127,2",
        "n1,128,2 n1,128,2", "n1,129,3 n1,129,2", "n2,300,2 n2,300,3", "n1,4095,1 n1,4095,1", "n1,4096,1 n1,4096,1", "n1,4097,2 n1,4097,1", "n2,3,5,2 n2,3,5,4" };
    EACH(pooled) op_case_add("softmax_pool", pooled[k], rec_softmax_pool, ref_softmax_pool);
    static const char *const normed[] = { "n3,5 p5 n5", "n3,5", "n2,3,4 p4 n4", "n5 p5 n5", "n300,3 p3 n3", "n129,2", "n4097,2 p2 n2", "n3,40 p40 n40" };
    EACH(normed) op_case_add("layer_norm", normed[k], rec_layer_norm, ref_layer_norm)->a = 1e-2;

    op_case_axes("gather", "n5,3 i5:4", rec_gather, ref_gather, 0, 0, 0, 0); op_case_axes("gather", "n5,3 i3:7", rec_gather, ref_gather, 1, 0, 0, 0);
    op_case_axes("gather", "n2,5,3 i5:4", rec_gather, ref_gather, -2, 0, 0, 0); op_case_axes("gather", "n300,2 i300:150", rec_gather, ref_gather, 0, 0, 0, 0);
    op_case_axes("gather", "n5,3 i5:0", rec_gather, ref_gather, 0, 0, 0, 0); op_case_axes("gather", "n6 i6:2", rec_gather, ref_gather, 0, 0, 0, 0);
    op_case_axes("scatter_add", "n4,3 i5:4", rec_scatter_add, ref_scatter_add, 0, 5, 0, 0); op_case_axes("scatter_add", "n2,4,3 i3:4", rec_scatter_add, ref_scatter_add, 1, 3, 0, 0);
    op_case_axes("scatter_add", "n2,4 i6:4", rec_scatter_add, ref_scatter_add, -1, 6, 0, 0); op_case_axes("scatter_add", "n300,2 i3:300", rec_scatter_add, ref_scatter_add, 0, 3, 0, 0);
    op_case_axes("one_hot", "i4:5", rec_one_hot, ref_one_hot, 4, 0, 0, 0); op_case_axes("one_hot", "i4:2,3", rec_one_hot, ref_one_hot, 4, 0, 0, 0);
    op_case_axes("one_hot", "i4:", rec_one_hot, ref_one_hot, 4, 0, 0, 0);
}

// ---- running a case ----
#if MIL_REAL_IS_FLOAT
#define CASE_TOLERANCE 5e-5                                // relative to the largest element: sums of 4097 numbers of both signs
#define CASE_GRAD_TOLERANCE 1e-4
#else
#define CASE_TOLERANCE 1e-11
#define CASE_GRAD_TOLERANCE 1e-7
#endif

static double case_largest(const double *v, int64_t n)
{
    double top = 1;
    for (int64_t i = 0; i < n; i++) if (fabs(v[i]) > top) top = fabs(v[i]);
    return top;
}

static mil_tensor case_tensor(const array *a, char letter)
{
    mil_tensor t;
    if (letter == 'i') {
        int64_t *v = (int64_t *)malloc(((size_t)a->count + 1) * sizeof *v);
        for (int64_t i = 0; i < a->count; i++) v[i] = (int64_t)a->v[i];
        t = mil_tensor_make(v, MIL_I64, a->rank, a->shape);
    } else {
        mil_real *v = (mil_real *)malloc(((size_t)a->count + 1) * sizeof *v);
        for (int64_t i = 0; i < a->count; i++) {
            v[i] = (mil_real)a->v[i];
            a->v[i] = (double)v[i];                        // the reference sees what the op sees
        }
        t = mil_tensor_make(v, MIL_REAL_DTYPE, a->rank, a->shape);
    }
    return t;
}

// A kept value as double. NaN everywhere when it cannot be read.
static double *case_read(mil_node *n)
{
    double *v = (double *)malloc(((size_t)n->count + 1) * sizeof *v);
    for (int64_t i = 0; i < n->count; i++) v[i] = (double)NAN;
    if (n->dtype == MIL_I64) {
        int64_t *x = (int64_t *)malloc(((size_t)n->count + 1) * sizeof *x);
        if (mil_node_read(n, x, n->count) == MIL_OK) for (int64_t i = 0; i < n->count; i++) v[i] = (double)x[i];
        free(x);
    } else {
        mil_real *x = (mil_real *)malloc(((size_t)n->count + 1) * sizeof *x);
        if (mil_node_read(n, x, n->count) == MIL_OK) for (int64_t i = 0; i < n->count; i++) v[i] = (double)x[i];
        free(x);
    }
    return v;
}

// sum of y * cotangent for the reference, with element e of input k moved by step
static double case_moved(const op_case *c, array *x, int count, int k, int64_t e, double step, const array *cotangent)
{
    const double v = x[k].v[e];
    double sum = 0;
    x[k].v[e] = v + step;
    array y = c->reference(c, x, count);
    for (int64_t i = 0; i < y.count; i++) sum += y.v[i] * cotangent->v[i];
    x[k].v[e] = v;
    free(y.v);
    return sum;
}

// Differences of the reference, kept from one configuration to the next: [case][input * CASE_PLACES + place], NaN where unknown.
enum { CASE_PLACES = 12 };
static double *op_case_known[1024];

static double case_difference(const op_case *c, array *x, int count, int k, int64_t e, int64_t place, const array *cotangent)
{
    double **known = &op_case_known[c - op_cases], *d;
    if (!*known) {
        *known = (double *)malloc(CASE_INPUTS * CASE_PLACES * sizeof **known);
        for (int i = 0; i < CASE_INPUTS * CASE_PLACES; i++) (*known)[i] = (double)NAN;
    }
    d = &(*known)[k * CASE_PLACES + place];
    if (isnan(*d)) {
        const double h = 1e-4, one = case_moved(c, x, count, k, e, h, cotangent) - case_moved(c, x, count, k, e, -h, cotangent),
                     two = case_moved(c, x, count, k, e, 2 * h, cotangent) - case_moved(c, x, count, k, e, -2 * h, cotangent);
        *d = (8 * one - two) / (12 * h);
    }
    return *d;
}

static void (*op_case_watch)(mil_tape *tape);              // is shown each tape before it is freed
static int op_case_reduced;                                // 1: each input is made by a reduction, see case_reduced

// x itself as the result of a reduction over two more rows than it has: [I; 0]^T [x; 0]. Other shapes than matrices stay.
static mil_node *case_reduced(mil_tape *tape, mil_node *x, mil_tensor *eye)
{
    if (!x || x->rank < 2 || x->count == 0 || x->shape[x->rank - 2] > 300) return x;
    const int64_t n = x->shape[x->rank - 2], lead = x->count / (n * x->shape[x->rank - 1]);
    int64_t shape[MIL_MAX_RANK];
    memcpy(shape, x->shape, sizeof shape);
    shape[x->rank - 2] = n + 2;
    shape[x->rank - 1] = n;
    mil_real *v = (mil_real *)calloc((size_t)(lead * (n + 2) * n), sizeof *v);
    for (int64_t b = 0; b < lead; b++)
        for (int64_t i = 0; i < n; i++) v[(b * (n + 2) + i) * n + i] = 1;
    *eye = mil_tensor_make(v, MIL_REAL_DTYPE, x->rank, shape);
    mil_node *y = mil_matmul_t(mil_input(tape, "eye", eye), mil_pad(x, -2, 0, 2), 1, 0);
    check_true(y && y->kind == MIL_KIND_REDUCE && y->rows == lead * n && y->in_rows == n + 2, "case_reduced", 0, "a reduction's rows");
    return y;
}

// Records, runs and compares with the reference: the value, and the gradient by every input that has one, at up to 12 places
// each by central differences of order 4 of the reference. Returns whether all agreed.
static int op_case_check(mil_context *ctx, const op_case *c, const char *where, const mil_tape_option *options, int option_count)
{
    array x[CASE_INPUTS];
    char letter[CASE_INPUTS];
    mil_tensor t[CASE_INPUTS];
    mil_tensor eye[CASE_INPUTS];
    mil_node *in[CASE_INPUTS], *given[CASE_INPUTS], *grad[CASE_INPUTS];
    char label[256];
    const int before = check_failures;
    const int count = case_inputs(c, x, letter);
    mil_tape *tape = NULL;
    uint64_t state = 99;
    snprintf(label, sizeof label, "%s: %s(%s) i %d %d a %g %s", where, c->name, c->inputs, c->i[0], c->i[1], c->a, c->shape ? c->shape : "");
    memset(grad, 0, sizeof grad);
    memset(eye, 0, sizeof eye);
    for (int k = 0; k < count; k++) t[k] = case_tensor(&x[k], letter[k]);
    array y = c->reference(c, x, count);
    array cotangent = array_new(y.rank, y.shape);
    for (int64_t i = 0; i < y.count; i++) cotangent.v[i] = 2 * case_random(&state) - 1;
    mil_tensor dy = case_tensor(&cotangent, 'n');

    if (check_true(mil_tape_create(ctx, &tape) == MIL_OK, label, 0, "tape")) {
        for (int i = 0; i < option_count; i++) mil_tape_set(tape, options[i], 1);
        mil_tape_training(tape, 1);
        for (int k = 0; k < count; k++) {
            in[k] = mil_input(tape, "x", &t[k]);
            if (letter[k] == 'n' || letter[k] == 'p') mil_node_want_grad(in[k]);
            given[k] = op_case_reduced && letter[k] != 'i' ? case_reduced(tape, in[k], &eye[k]) : in[k];
        }
        mil_node *value = c->record(c, tape, given, t, count), *d = mil_input(tape, "dy", &dy);
        mil_node_keep(value);
        if (value && value->dtype == MIL_REAL_DTYPE) {
            mil_tape_backward_from(tape, &value, &d, 1);
            for (int k = 0; k < count; k++) mil_node_keep(grad[k] = mil_node_grad(in[k]));
        }
        if (!check_true(mil_tape_run(tape) == MIL_OK && value, label, 0, mil_error(ctx))) goto done;
        check_true(value->rank == y.rank && memcmp(value->shape, y.shape, (size_t)y.rank * sizeof *y.shape) == 0, label, 0, "shape of the value");
        if (value->count != y.count) goto done;
        double *got = case_read(value), size = case_largest(y.v, y.count);
        for (int64_t i = 0; i < y.count; i++)
            if (!check_near(got[i] / size, y.v[i] / size, CASE_TOLERANCE, label, (int)i, "value")) break;
        free(got);
        for (int k = 0; k < count; k++) {
            if (letter[k] == 'm' || letter[k] == 'i') continue;
            if (c->cut) { check_true(grad[k] == NULL, label, k, "no gradient passes"); continue; }
            if (!check_true(grad[k] != NULL, label, k, "a gradient") || !check_true(grad[k]->count == x[k].count, label, k, "gradient's size")) continue;
            got = case_read(grad[k]);
            size = case_largest(got, x[k].count);
            state = 99 + (uint64_t)k;
            const int64_t most = x[k].count > 5000 || y.count > 5000 ? 2 : CASE_PLACES, places = x[k].count > most ? most : x[k].count;
            for (int64_t p = 0; p < places; p++) {
                const int64_t e = places == x[k].count ? p : p == 0 ? 0 : p == 1 ? x[k].count - 1 : (int64_t)(case_random(&state) * (double)x[k].count);
                if (!check_near(got[e] / size, case_difference(c, x, count, k, e, p, &cotangent) / size, CASE_GRAD_TOLERANCE, label, k, "gradient")) break;
            }
            free(got);
        }
    done:
        if (op_case_watch) op_case_watch(tape);
        mil_tape_free(tape);
    }
    for (int k = 0; k < count; k++) { free(x[k].v); free(t[k].data); free(eye[k].data); }
    free(y.v);
    free(cotangent.v);
    free(dy.data);
    return check_failures == before;
}
#endif
