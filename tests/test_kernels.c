// build: float double private
// Every kernel of every CPU tier that is here, against plain loops in a wider type: at sizes around a vector and a tile, with
// odd strides, unaligned, between guards of NaN that nobody may write to and that no result may show.
#define MIL_IMPLEMENTATION
#define MIL_KEEP_PRIVATE_MACROS
#include "mil.h"
#include "check.h"
#include <stdlib.h>

// The type of references, and its functions.
#if MIL_REAL_IS_FLOAT
typedef double wide;
#define WIDE(f) f
#define EPS ((wide)FLT_EPSILON)
#define LARGEST FLT_MAX
enum { FRACTION = 24, LEAST = -149 };                      // bits of a real; the exponent of the least one above 0
#else
typedef long double wide;
#define WIDE(f) f##l
#define EPS ((wide)DBL_EPSILON)
#define LARGEST DBL_MAX
enum { FRACTION = 53, LEAST = -1074 };
#endif

static const mili_kernels *K;                              // the tier under test

static void each_tier(void (*check)(void))
{
    static const mil_cpu tiers[] = { MIL_CPU_PLAIN, MIL_CPU_AVX2, MIL_CPU_AVX512, MIL_CPU_NEON };
    static const char *const names[] = { "plain", "avx2", "avx512", "neon" };
    static int said[4];
    for (int i = 0; i < 4; i++) {
        const int before = check_failures;
        K = mili_kernels_choose(tiers[i]);
        if (!K) {
            if (!said[i]++) printf("skip %s: not on this machine or not in this build\n", names[i]);
            continue;
        }
        CHECK(K->tier == tiers[i] && strcmp(K->name, names[i]) == 0);
        check();
        if (check_failures > before) printf("that was tier %s\n", K->name);
    }
}

// ---- arrays between guards -------------------------------------------------------------------------------------------
// All bytes are 0xff, a NaN in any float format. Under the address sanitizer nothing stands behind an array: there the
// allocator's own zone tells of reads too.
#if defined(__SANITIZE_ADDRESS__)
#define AFTER 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define AFTER 0
#endif
#endif
#ifndef AFTER
#define AFTER 128
#endif
enum { BEFORE = 128, LIVE_MAX = 16 };

static struct { unsigned char *block; size_t before, size; } live[LIVE_MAX];
static int live_count;

static void *guarded(size_t size, size_t shift)            // in bytes
{
    const size_t before = BEFORE + shift;
    unsigned char *block = (unsigned char *)malloc(before + size + AFTER);
    if (!block || live_count == LIVE_MAX) {
        printf("no memory for the test\n");
        exit(2);
    }
    memset(block, 0xff, before + size + AFTER);
    live[live_count].block = block;
    live[live_count].before = before;
    live[live_count++].size = size;
    return block + before;
}

// `shift` 0, or 1: not aligned to a vector.
static mil_real *reals(int64_t count, int shift) { return (mil_real *)guarded((size_t)count * sizeof(mil_real), (size_t)shift * sizeof(mil_real)); }

// Frees those from `first` on; returns whether their guards are what they were.
static int guards_hold_from(int first)
{
    int hold = 1;
    while (live_count > first) {
        const unsigned char *p = live[--live_count].block, *end = p + live[live_count].before + live[live_count].size;
        for (size_t j = 0; j < live[live_count].before; j++) hold &= p[j] == 0xff;
        for (size_t j = 0; j < AFTER; j++) hold &= end[j] == 0xff;
        free(live[live_count].block);
    }
    return hold;
}
static int guards_hold(void) { return guards_hold_from(0); }

static int is_nan(mil_real x) { return x != x; }
static int untouched(const mil_real *x)
{
    const unsigned char *p = (const unsigned char *)x;
    for (size_t i = 0; i < sizeof *x; i++)
        if (p[i] != 0xff) return 0;
    return 1;
}
static int same_bits(const mil_real *a, const mil_real *b, int64_t n) { return n == 0 || memcmp(a, b, (size_t)n * sizeof *a) == 0; }

static uint64_t drawn = 1;
static uint32_t draw_bits(void)
{
    drawn = drawn * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(drawn >> 32);
}
static int64_t draw_below(int64_t n) { return (int64_t)(draw_bits() % (uint32_t)n); }
static mil_real draw(void) { return (mil_real)((double)draw_bits() / 2147483648.0 - 1); }            // in [-1, 1)

static const mil_real INF = (mil_real)HUGE_VAL, NOT = (mil_real)NAN;

// ---- GEMM -------------------------------------------------------------------------------------------------------------
enum { M_ALL = MILI_NR_MAX + 1, K_ALL = 2 * MILI_KC + 3, N_ALL = 600 };

static mil_real all_a[M_ALL * K_ALL], all_b[K_ALL * N_ALL], all_c[M_ALL * N_ALL], all_bias[N_ALL];
static mil_real base[3][M_ALL * N_ALL], got[M_ALL * N_ALL];
static wide sum_at[M_ALL * N_ALL], size_at[M_ALL * N_ALL];

enum { ALONE, BIASED, ADDED, ADDED_NOT_BIASED };

typedef struct gemm_case {
    int64_t m, n, k, first;                                // rows first.. of all_a
    int packed, pairs, mode, a_layout, b_layout, shift;
    int64_t extra;                                         // unused reals between rows (or columns), NaN
} gemm_case;

// [rows, cols] of `from`, of rows `step` apart, as a matrix with such strides.
static mil_real *strided(const mil_real *from, int64_t step, int64_t rows, int64_t cols, int64_t row, int64_t col, int shift)
{
    mil_real *x = reals(rows > 0 && cols > 0 ? (rows - 1) * row + (cols - 1) * col + 1 : 0, shift);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) x[i * row + j * col] = from[i * step + j];
    return x;
}

static void gemm_run(const gemm_case *t, mil_real *out)
{
    const int64_t m = t->m, n = t->n, k = t->k, x = t->extra;
    const int added = t->mode == ADDED || t->mode == ADDED_NOT_BIASED;
    int64_t outside = 0;
    mili_gemm g;
    memset(&g, 0, sizeof g);
    g.m = m;
    g.n = n;
    g.k = k;
    switch (t->a_layout) {
    case 0: g.a_row = k + x, g.a_col = 1; break;
    case 1: g.a_row = 1, g.a_col = m + x; break;
    case 2: g.a_row = 3 * k + x, g.a_col = 3; break;
    default: g.a_row = 2, g.a_col = 2 * m + x; break;
    }
    switch (t->b_layout) {
    case 0: g.b_row = n + x, g.b_col = 1; break;
    case 1: g.b_row = 1, g.b_col = k + x; break;
    case 2: g.b_row = 2 * n + x, g.b_col = 2; break;
    default: g.b_row = 3, g.b_col = 3 * k + x; break;
    }
    g.a = strided(all_a + t->first * K_ALL, K_ALL, m, k, g.a_row, g.a_col, t->shift);
    const mil_real *b = strided(all_b, N_ALL, k, n, g.b_row, g.b_col, t->shift);
    if (t->pairs) {
        const int64_t panels = mili_gemm_panels(K, n), cut = panels > 1 ? draw_below(panels) : 0;
        mil_real *packed = reals(panels * K->nr * ((k + 1) / 2), t->shift);
        mili_gemm_pack_pairs(K, packed, b, g.b_row, g.b_col, n, k, cut, panels);
        mili_gemm_pack_pairs(K, packed, b, g.b_row, g.b_col, n, k, 0, cut);
        g.packed = packed;
        g.pairs = 1;
    } else if (t->packed) {
        const int64_t panels = mili_gemm_panels(K, n), cut = panels > 1 ? draw_below(panels) : 0;
        mil_real *packed = reals(mili_gemm_packed_count(K, n, k), t->shift);
        if (cut) {
            mili_gemm_pack_panels(K, packed, b, g.b_row, g.b_col, n, k, cut, panels);
            mili_gemm_pack_panels(K, packed, b, g.b_row, g.b_col, n, k, 0, cut);
        } else {
            mili_gemm_pack(K, packed, b, g.b_row, g.b_col, n, k);
        }
        g.packed = packed;
    } else {
        g.b = b;
        g.scratch = reals(MILI_MIN(mili_gemm_packed_count(K, n, MILI_MIN(k, MILI_KC)), MILI_GEMM_BLOCK), t->shift);
    }
    g.c_row = n + x;
    g.accumulate = added;
    g.c = added ? strided(all_c + t->first * N_ALL, N_ALL, m, n, g.c_row, 1, t->shift) : reals(m > 0 && n > 0 ? (m - 1) * g.c_row + n : 0, t->shift);
    if (t->mode == BIASED || t->mode == ADDED_NOT_BIASED) g.bias = strided(all_bias, N_ALL, 1, n, n, 1, t->shift);
    mili_gemm_run(K, &g);
    for (int64_t i = 0; i < m && n > 0; i++)
        for (int64_t j = 0; j < (i + 1 < m ? g.c_row : n); j++) {
            if (j < n) out[i * n + j] = g.c[i * g.c_row + j];
            else outside += !untouched(g.c + i * g.c_row + j);
        }
    CHECK(outside == 0);
    CHECK(guards_hold());
}

static void gemm_say(const gemm_case *t)
{
    printf("m %d n %d k %d first %d packed %d pairs %d mode %d a_layout %d b_layout %d shift %d extra %d\n", (int)t->m, (int)t->n, (int)t->k,
           (int)t->first, t->packed, t->pairs, t->mode, t->a_layout, t->b_layout, t->shift, (int)t->extra);
}

// One n and k: all rows against a plain loop, then rows from anywhere, laid out in every way, against the bits of those.
static void gemm_check(int64_t n, int64_t k, int pairs, const int64_t *sizes, int size_count)
{
    gemm_case t;
    memset(&t, 0, sizeof t);
    t.m = M_ALL;
    t.n = n;
    t.k = k;
    t.packed = 1;
    t.pairs = pairs;
    for (int mode = ALONE; mode <= ADDED; mode++) {
        int64_t wrong = 0;
        t.mode = mode;
        gemm_run(&t, base[mode]);
        for (int64_t i = 0; i < M_ALL; i++)
            for (int64_t j = 0; j < n; j++) {
                // k products, k sums (fused or not) and the block sums: each rounds by at most EPS / 2 of what there is so far.
                const wide start = (wide)(mode == BIASED ? all_bias[j] : mode == ADDED ? all_c[i * N_ALL + j] : 0);
                const wide want = sum_at[i * N_ALL + j] + start, tol = ((wide)k + 2) * EPS * (size_at[i * N_ALL + j] + WIDE(fabs)(start));
                wrong += !(WIDE(fabs)((wide)base[mode][i * n + j] - want) <= tol);
            }
        if (!CHECK(wrong == 0)) gemm_say(&t);
    }
    for (int s = 0; s < size_count; s++)
        for (int again = 0; again < 4; again++) {
            t.m = sizes[s];
            if (t.m > M_ALL) continue;
            t.first = draw_below(M_ALL - t.m + 1);
            t.packed = pairs || (again & 1);
            t.mode = (int)draw_below(4);
            t.a_layout = pairs ? 0 : (int)draw_below(4);
            t.b_layout = (int)draw_below(4);
            t.shift = (int)draw_below(2);
            t.extra = draw_below(4);
            gemm_run(&t, got);
            if (!CHECK(same_bits(got, base[t.mode == ADDED_NOT_BIASED ? ADDED : t.mode] + t.first * n, t.m * n))) gemm_say(&t);
        }
}

// The nearest bfloat16, ties to even: 8 bits of fraction, the leading 1 counted.
static mil_real to_bfloat(mil_real x)
{
    int exponent = 0;                                      // of an infinity or a NaN: any
    const double f = frexp((double)x, &exponent);
    return (mil_real)ldexp(nearbyint(ldexp(f, 8)), exponent - 8);
}

static void gemm_of_tier(int pairs)
{
    const int64_t mr = K->mr, nr = K->nr;
    const int64_t sizes[] = { 0, 1, MILI_THIN - 1, MILI_THIN, MILI_THIN + 1, mr - 1, mr, mr + 1, nr - 1, nr, nr + 1, MILI_KC - 1, MILI_KC, MILI_KC + 1, K_ALL };
    const int count = (int)(sizeof sizes / sizeof *sizes);
    const int64_t beyond = MILI_GEMM_BLOCK / MILI_KC + nr + 1;             // columns: more than one block of B
    CHECK(beyond <= N_ALL && mr <= MILI_MR_MAX && nr <= MILI_NR_MAX && nr == 2 * K->lanes);
    for (int i = 0; i < M_ALL * K_ALL; i++) all_a[i] = draw();
    for (int i = 0; i < K_ALL * N_ALL; i++) all_b[i] = draw();
    for (int i = 0; i < M_ALL * N_ALL; i++) all_c[i] = draw();
    for (int i = 0; i < N_ALL; i++) all_bias[i] = draw();
    for (int s = 0; s < count; s++) {
        const int64_t k = sizes[s], n_all = k > MILI_KC ? beyond : MILI_KC + 1;
        for (int64_t i = 0; i < M_ALL; i++) {
            wide *sum = sum_at + i * N_ALL, *size = size_at + i * N_ALL;
            for (int64_t j = 0; j < n_all; j++) sum[j] = size[j] = 0;
            for (int64_t p = 0; p < k; p++) {
                const mil_real *b = all_b + p * N_ALL, a = pairs ? to_bfloat(all_a[i * K_ALL + p]) : all_a[i * K_ALL + p];
                for (int64_t j = 0; j < n_all; j++) {
                    const wide x = (wide)a * (wide)(pairs ? to_bfloat(b[j]) : b[j]);
                    sum[j] += x;
                    size[j] += WIDE(fabs)(x);
                }
            }
        }
        for (int c = pairs ? 4 : 0; c < count - 1; c++) gemm_check(sizes[c], k, pairs, sizes, count);
        if (k > MILI_KC) gemm_check(beyond, k, pairs, sizes, count);
    }
}

static void gemm_plain_floats(void) { gemm_of_tier(0); }
static void gemm_pairs(void)
{
    if (K->tile_pairs && mili_cpu_has_pairs()) gemm_of_tier(1);
    else printf("skip pairs of bfloat16 on %s: no such instruction here\n", K->name);
}

TEST(gemm_has_the_right_values_and_the_same_bits_in_any_company) { each_tier(gemm_plain_floats); }
TEST(gemm_of_pairs_is_that_of_numbers_rounded_to_bfloat) { each_tier(gemm_pairs); }

// Pairs: n numbers make (n + 1) / 2 words, an odd one stands beside a zero. The instruction takes subnormal numbers as 0.
static void pairs_check(void)
{
    if (!K->to_pairs || !mili_cpu_has_pairs()) return;
    for (int64_t n = 0; n <= 70; n++)
        for (int shift = 0; shift < 2; shift++) {
            mil_real *x = reals(n, shift), *y = reals((n + 1) / 2, shift);
            int64_t wrong = 0;
            for (int64_t i = 0; i < n; i++) {
                uint32_t bits = draw_bits();
                float f;
                if ((bits & 0x7f800000) == 0) bits |= 0x3f800000;
                memcpy(&f, &bits, sizeof f);
                x[i] = (mil_real)f;
            }
            K->to_pairs(y, x, n);
            for (int64_t i = 0; i < n + n % 2; i++) {
                uint32_t word;
                float f;
                memcpy(&word, y + i / 2, sizeof word);
                word = i % 2 ? word & 0xffff0000u : word << 16;
                memcpy(&f, &word, sizeof f);
                if (i == n) wrong += word != 0;
                else if (is_nan(x[i])) wrong += f == f;
                else wrong += f != (float)to_bfloat(x[i]);
            }
            CHECK(wrong == 0);
            CHECK(guards_hold());
        }
}
TEST(pairs_are_rounded_to_nearest) { each_tier(pairs_check); }

// ---- y = f(x) ---------------------------------------------------------------------------------------------------------
enum { EXP, TANH, SIGMOID, ERF, GELU, SILU, GELU_GRAD, SILU_GRAD, RELU, MAPS };
static const char *const map_name[MAPS] = { "exp", "tanh", "sigmoid", "erf", "gelu", "silu", "gelu_grad", "silu_grad", "relu" };

static mili_map_fn *map_of(const mili_kernels *kernels, int f)
{
    mili_map_fn *const all[MAPS] = { kernels->exp, kernels->tanh, kernels->sigmoid, kernels->erf, kernels->gelu, kernels->silu, kernels->gelu_grad, kernels->silu_grad, kernels->relu };
    return all[f];
}

static wide map_wide(int f, wide x)
{
    const wide root = (wide)0.70710678118654752440084436210485L, two = 2 / WIDE(sqrt)((wide)3.14159265358979323846264338327950L);
    const int below = x < 0;
    const wide e = WIDE(exp)(below ? x : -x);              // of -|x|
    switch (f) {
    case EXP: return WIDE(exp)(x);
    case TANH: return WIDE(tanh)(x);
    case SIGMOID: return (below ? e : 1) / (1 + e);
    case ERF: return WIDE(erf)(x);
    case GELU: return isinf(x) ? (below ? (wide)-0.0 : x) : x * WIDE(erfc)(-x * root) / 2;
    case SILU: return isinf(x) ? (below ? (wide)-0.0 : x) : x * (below ? e : 1) / (1 + e);
    case GELU_GRAD: return isinf(x) ? !below : WIDE(erfc)(-x * root) / 2 + x * WIDE(exp)(-x * x / 2) * two * root / 2;
    case SILU_GRAD: return isinf(x) ? !below : (below ? e : 1) / (1 + e) * (1 + x * (below ? 1 : e) / (1 + e));
    default: return x < 0 ? 0 : x;
    }
}

// Error in units in the last place of the true value; -1: not what it must be (a NaN, an infinity, a sign of 0).
static double ulps(mil_real y, wide want)
{
    int exponent;
    if (want != want) return is_nan(y) ? 0 : -1;
    if (WIDE(fabs)(want) > (wide)LARGEST) return (wide)y == (want > 0 ? (wide)INF : -(wide)INF) ? 0 : -1;
    if (!(fabs((double)y) <= (double)LARGEST)) return -1;
    if (want == 0) return y == 0 && !signbit(y) == !signbit(want) ? 0 : -1;
    WIDE(frexp)(want, &exponent);
    exponent -= FRACTION;
    return (double)WIDE(ldexp)(WIDE(fabs)((wide)y - want), -(exponent < LEAST ? LEAST : exponent));
}

// The bounds that the banner of >>kernels states; those of the plain tier hold over the C libraries of glibc and musl. Gradients
// cross 0 and have an absolute bound; gelu and silu have another one, the wider of the two, where the result is tiny. The plain
// gelu rounds the argument of erfc twice, by EPS together, and ln erfc there is about -x x / 2: x x EPS, at most 2 x x ulp.
typedef struct { double plain, vector, absolute; } bound;
static const bound bounds[MAPS] = { { 1.1, 1.1, 0 }, { 2.6, 2.6, 0 }, { 2.5, 2.5, 0 }, { 1.9, 1.9, 0 }, { 4, 7, 0 }, { 3.3, 3.3, 0 }, { 0, 0, 2.2e-7 }, { 0, 0, 2e-7 }, { 0, 0, 0 } };
#if MIL_REAL_IS_FLOAT
static const wide TINY = 1e-35, TINY_ERROR = 1e-43;
#else
static const wide TINY = 1e-300L, TINY_ERROR = 1e-320L;
#endif

static int map_holds(int f, mil_real x, mil_real y, wide want)
{
    const bound *b = &bounds[f];
    const wide off = WIDE(fabs)((wide)y - want);
    double e, most = b->vector;
    if (f == RELU && want == 0) return y == 0;             // of -0: what the CPU's max makes of 0 and -0
    if (b->absolute > 0 && WIDE(fabs)(want) <= 2) return off <= (wide)b->absolute;
    if ((f == GELU || f == SILU) && x < 0 && WIDE(fabs)(want) < TINY && off <= TINY_ERROR) return 1;
    if (K->tier == MIL_CPU_PLAIN) most = b->plain + (f == GELU && x < 0 ? 2 * (double)x * (double)x : 0);
    e = ulps(y, want);
    return e >= 0 && e <= most;
}

enum { SIZE_MAX_HERE = 70 };

// Numbers of all kinds: mostly around 0, now and then one that is special.
static mil_real any_number(void)
{
    static const double kinds[] = { 0, -0.0, 1e-30, -1e-30, 100, -100, 1e30, -1e30, 0.9, -0.9 };
    const int64_t kind = draw_below(40);
    if (kind < 10) return (mil_real)kinds[kind];
    if (kind == 10) return INF;
    if (kind == 11) return -INF;
    if (kind == 12) return NOT;
    if (kind == 13) return (mil_real)ldexp(1, LEAST);
    return 8 * draw();
}

// The same numbers, or both NaN (whose bits may differ: which operand of an operation they come from is the compiler's choice).
static int same_numbers(const mil_real *a, const mil_real *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!(is_nan(a[i]) && is_nan(b[i])) && !same_bits(a + i, b + i, 1)) return 0;
    return 1;
}

static void maps_check(void)
{
    for (int f = 0; f < MAPS; f++)
        for (int64_t n = 0; n <= SIZE_MAX_HERE; n++)
            for (int how = 0; how < 4; how++) {            // unaligned, in place
                mil_real *x = reals(n, how & 1), *y = how & 2 ? x : reals(n, how & 1);
                mil_real from[SIZE_MAX_HERE], alone, lane[MILI_NR_MAX];
                int64_t wrong = 0, differ = 0;
                for (int64_t i = 0; i < n; i++) from[i] = x[i] = any_number();
                map_of(K, f)(y, x, n);
                for (int64_t i = 0; i < n; i++) {
                    wrong += !map_holds(f, from[i], y[i], map_wide(f, (wide)from[i]));
                    map_of(K, f)(&alone, from + i, 1);
                    for (int j = 0; j < K->lanes; j++) lane[j] = j == i % K->lanes ? from[i] : draw();
                    map_of(K, f)(lane, lane, K->lanes);
                    differ += !same_numbers(y + i, &alone, 1) || !same_numbers(y + i, lane + i % K->lanes, 1);
                }
                if (!CHECK(wrong == 0) || !CHECK(differ == 0)) printf("%s of %d, how %d\n", map_name[f], (int)n, how);
                CHECK(guards_hold());
            }
}
TEST(maps_give_each_number_its_own_result_at_every_size) { each_tier(maps_check); }

// ---- y = f(a, b) ------------------------------------------------------------------------------------------------------
enum { GATE, ADD, SUB, MUL, DIV, TANH_GRAD, SIGMOID_GRAD, RELU_GRAD, ZIPS, DROP = ZIPS, ALL_ZIPS };
static const char *const zip_name[ALL_ZIPS] = { "gate", "add", "sub", "mul", "div", "tanh_grad", "sigmoid_grad", "relu_grad", "drop" };
static const mil_real RATE = (mil_real)0.375;              // of drop

static void zip_run(int f, mil_real *y, const mil_real *a, const mil_real *b, int64_t n)
{
    mili_zip_fn *const all[ZIPS] = { K->gate, K->add, K->sub, K->mul, K->div, K->tanh_grad, K->sigmoid_grad, K->relu_grad };
    if (f == DROP) K->drop(y, a, b, RATE, n);
    else all[f](y, a, b, n);
}

// *tol: the rounding of each step, in EPS of what it yields.
static wide zip_wide(int f, wide a, wide b, wide *tol)
{
    wide y = 0;
    *tol = EPS;
    switch (f) {
    case GATE:
        y = map_wide(TANH, a) * map_wide(SIGMOID, b);
        *tol = 6 * EPS;
        break;
    case ADD: y = a + b; break;
    case SUB: y = a - b; break;
    case MUL: y = a * b; break;
    case DIV: y = a / b; break;
    case TANH_GRAD:                                        // 1 - v v is rounded at the size of 1
        y = b * (1 - a * a);
        *tol *= 3 * (1 + a * a) * WIDE(fabs)(b);
        return y;
    case SIGMOID_GRAD:
        y = b * (a * (1 - a));
        *tol *= 3 * (1 + WIDE(fabs)(a)) * WIDE(fabs)(a * b);
        return y;
    case RELU_GRAD:
        y = a > 0 ? b : 0;
        *tol = 0;
        break;
    default:
        y = b < (wide)RATE ? 0 : a / (1 - (wide)RATE);
        *tol = 3 * EPS;
        break;
    }
    *tol *= WIDE(fabs)(y);
    return y;
}

static void zips_check(void)
{
    for (int f = 0; f < ALL_ZIPS; f++)
        for (int64_t n = 0; n <= SIZE_MAX_HERE; n++)
            for (int how = 0; how < 6; how++) {            // unaligned; y apart, in a, in b
                mil_real *a = reals(n, how & 1), *b = reals(n, how & 1), *y = how / 2 == 1 ? a : how / 2 == 2 ? b : reals(n, how & 1);
                mil_real a0[SIZE_MAX_HERE], b0[SIZE_MAX_HERE], alone;
                int64_t wrong = 0, differ = 0;
                for (int64_t i = 0; i < n; i++) {
                    a0[i] = a[i] = f == DROP ? 8 * draw() : 4 * draw();
                    b0[i] = b[i] = f == DROP ? (draw() + 1) / 2 : draw_below(10) == 0 ? 0 : 4 * draw();
                    if (draw_below(30) == 0) a0[i] = a[i] = f == RELU_GRAD || f == TANH_GRAD ? 0 : -0.0f;
                    if (draw_below(30) == 0) a0[i] = a[i] = NOT;
                }
                zip_run(f, y, a, b, n);
                for (int64_t i = 0; i < n; i++) {
                    wide tol, want = zip_wide(f, (wide)a0[i], (wide)b0[i], &tol);
                    wrong += !((wide)y[i] == want || (is_nan(y[i]) && want != want) || WIDE(fabs)((wide)y[i] - want) <= tol);
                    zip_run(f, &alone, a0 + i, b0 + i, 1);
                    differ += !same_numbers(y + i, &alone, 1);
                }
                if (!CHECK(wrong == 0) || !CHECK(differ == 0)) printf("%s of %d, how %d\n", zip_name[f], (int)n, how);
                CHECK(guards_hold());
            }
}
TEST(zips_give_each_pair_its_own_result_at_every_size) { each_tier(zips_check); }

// ---- axpy, scale, mul_add ---------------------------------------------------------------------------------------------
static void updates_check(void)
{
    for (int64_t n = 0; n <= SIZE_MAX_HERE; n++)
        for (int how = 0; how < 8; how++) {                // unaligned; axpy, mul_add, scale, scale in place
            const int f = how / 2;
            mil_real *x = reals(n, how & 1), *z = reals(n, how & 1), *y = f == 3 ? x : reals(n, how & 1);
            const mil_real s = draw(), t = draw();
            mil_real x0[SIZE_MAX_HERE], y0[SIZE_MAX_HERE], alone;
            int64_t wrong = 0, differ = 0;
            for (int64_t i = 0; i < n; i++) {
                y0[i] = draw();
                if (f < 2) y[i] = y0[i];
                x0[i] = x[i] = draw();
                z[i] = draw();
            }
            if (f == 0) K->axpy(y, s, x, n);
            else if (f == 1) K->mul_add(y, x, z, n);
            else K->scale(y, x, s, t, n);
            for (int64_t i = 0; i < n; i++) {
                const wide product = (wide)x0[i] * (wide)(f == 1 ? z[i] : s), start = (wide)(f < 2 ? y0[i] : t);
                wrong += !(WIDE(fabs)((wide)y[i] - (product + start)) <= EPS * (WIDE(fabs)(product) + WIDE(fabs)(start)));
                alone = y0[i];
                if (f == 0) K->axpy(&alone, s, x0 + i, 1);
                else if (f == 1) K->mul_add(&alone, x0 + i, z + i, 1);
                else K->scale(&alone, x0 + i, s, t, 1);
                differ += !same_bits(y + i, &alone, 1);
            }
            if (!CHECK(wrong == 0) || !CHECK(differ == 0)) printf("n %d, how %d\n", (int)n, how);
            CHECK(guards_hold());
        }
}
TEST(updates_give_each_number_its_own_result_at_every_size) { each_tier(updates_check); }

// ---- folds ------------------------------------------------------------------------------------------------------------
static void folds_check(void)
{
    for (int64_t n = 0; n <= 2 * SIZE_MAX_HERE; n++) {
        mil_real folded[2][4];
        mil_real from[2 * SIZE_MAX_HERE], other[2 * SIZE_MAX_HERE];
        wide sum = 0, size = 0, dot = 0, dot_size = 0;
        mil_real top = -INF, low = INF;
        for (int64_t i = 0; i < n; i++) {
            const mil_real v = from[i] = draw(), w = other[i] = draw();
            sum += (wide)v;
            size += (wide)fabs((double)v);
            dot += (wide)v * (wide)w;
            dot_size += WIDE(fabs)((wide)v * (wide)w);
            if (v > top) top = v;
            if (v < low) low = v;
        }
        for (int shift = 0; shift < 2; shift++) {
            mil_real *x = reals(n, shift), *y = reals(n, !shift);
            for (int64_t i = 0; i < n; i++) x[i] = from[i], y[i] = other[i];
            folded[shift][0] = K->sum(x, n);
            folded[shift][1] = K->dot(x, y, n);
            folded[shift][2] = K->max(x, n);
            folded[shift][3] = K->min(x, n);
            CHECK(K->finite(x, n) == 1);
            // One that is special, at every place.
            for (int64_t at = 0; at < n; at++) {
                static const double big[2] = { 1, -1 };
                x[at] = NOT;
                CHECK(is_nan(K->sum(x, n)) && is_nan(K->dot(x, y, n)) && is_nan(K->dot(y, x, n)) && is_nan(K->max(x, n)) && is_nan(K->min(x, n)));
                CHECK(!K->finite(x, n));
                for (int s = 0; s < 2; s++) {
                    x[at] = (mil_real)big[s] * INF;
                    CHECK(K->sum(x, n) == x[at] && !K->finite(x, n));
                    if (s == 0) CHECK(K->max(x, n) == INF && K->min(x, n) >= (n > 1 ? low : INF));
                    else CHECK(K->min(x, n) == -INF && K->max(x, n) <= (n > 1 ? top : -INF));
                    if (n > 1) {                           // an infinity hides no NaN
                        const int64_t behind = (at + 1 + draw_below(n - 1)) % n;
                        x[behind] = NOT;
                        CHECK(is_nan(K->max(x, n)) && is_nan(K->min(x, n)) && !K->finite(x, n));
                        x[behind] = from[behind];
                    }
                    x[at] = (mil_real)(big[s] * (double)LARGEST);
                    CHECK(K->finite(x, n) == 1 && (s == 0 ? K->max(x, n) : K->min(x, n)) == x[at]);
                }
                x[at] = from[at];
            }
            CHECK(guards_hold());
        }
        CHECK(same_bits(folded[0], folded[1], 4));         // never by the address
        CHECK(WIDE(fabs)((wide)folded[0][0] - sum) <= (wide)n * EPS * size);
        CHECK(WIDE(fabs)((wide)folded[0][1] - dot) <= (wide)n * EPS * dot_size);
        CHECK(folded[0][2] == top && folded[0][3] == low);
        if (n == 0) CHECK(folded[0][0] == 0 && folded[0][1] == 0 && folded[0][2] == -INF && folded[0][3] == INF);
    }
    // All of them infinite: the one that a fold begins with is no answer that came from elsewhere.
    for (int64_t n = 1; n <= SIZE_MAX_HERE; n++) {
        mil_real *x = reals(n, 1);
        for (int64_t i = 0; i < n; i++) x[i] = -INF;
        CHECK(K->max(x, n) == -INF && K->min(x, n) == -INF);
        for (int64_t i = 0; i < n; i++) x[i] = INF;
        CHECK(K->max(x, n) == INF && K->min(x, n) == INF);
        CHECK(guards_hold());
    }
}
TEST(folds_see_every_number_once_and_every_nan) { each_tier(folds_check); }

// ---- exp_sum, softmax -------------------------------------------------------------------------------------------------
static void softmax_check(void)
{
    for (int64_t n = 0; n <= SIZE_MAX_HERE; n++)
        for (int how = 0; how < 4; how++) {
            mil_real from[SIZE_MAX_HERE], top = -INF, sum;
            wide want = 0;
            int64_t wrong = 0;
            for (int64_t i = 0; i < n; i++) {
                from[i] = draw_below(10) == 0 && i > 0 ? -INF : 9 * draw();
                if (from[i] > top) top = from[i];
            }
            mil_real *x = reals(n, how & 1), *y = how & 2 ? x : reals(n, how & 1);
            const mil_real shift = n ? top : 0;
            for (int64_t i = 0; i < n; i++) x[i] = from[i];
            sum = K->exp_sum(y, x, n, shift);
            for (int64_t i = 0; i < n; i++) {
                const mil_real moved = from[i] - shift;
                mil_real one;
                K->exp(&one, &moved, 1);
                wrong += !same_bits(y + i, &one, 1);
                want += (wide)y[i];
            }
            CHECK(wrong == 0);
            CHECK(WIDE(fabs)((wide)sum - want) <= (wide)n * EPS * want);
            CHECK(guards_hold());

            x = reals(n, how & 1), y = how & 2 ? x : reals(n, how & 1);
            for (int64_t i = 0; i < n; i++) x[i] = from[i];
            mili_softmax_row(K, y, x, n);
            want = 0;
            for (int64_t i = 0; i < n; i++) want += WIDE(exp)((wide)from[i] - (wide)shift);
            for (int64_t i = 0; i < n; i++) {              // the difference is rounded at its size, at most 18
                const wide p = WIDE(exp)((wide)from[i] - (wide)shift) / want;
                wrong += !(WIDE(fabs)((wide)y[i] - p) <= ((wide)n + 18) * EPS * p);
            }
            CHECK(wrong == 0);
            for (int64_t at = 0; at < n; at++) {           // a NaN at any place spoils all, whatever else is there
                for (int64_t i = 0; i < n; i++) x[i] = at & 1 ? from[i] : -INF;
                x[at] = NOT;
                mili_softmax_row(K, y, x, n);
                for (int64_t i = 0; i < n; i++) wrong += !is_nan(y[i]);
            }
            for (int64_t i = 0; i < n; i++) x[i] = -INF;
            mili_softmax_row(K, y, x, n);
            for (int64_t i = 0; i < n; i++) wrong += !(y[i] == 0);
            CHECK(wrong == 0);
            CHECK(guards_hold());
        }
}
TEST(softmax_of_a_row_sums_to_one_or_is_all_zeros) { each_tier(softmax_check); }

// ---- conversions ------------------------------------------------------------------------------------------------------
// The value of a 16-bit float, by its definition. NaN: any.
static double narrow_value(unsigned h, int fraction)
{
    const int bias = (1 << (14 - fraction)) - 1, exponent = (int)(h >> fraction) & (2 * bias + 1), sign = h & 0x8000 ? -1 : 1;
    const int digits = (int)h & ((1 << fraction) - 1);
    if (exponent == 2 * bias + 1) return digits ? (double)NAN : sign * (double)HUGE_VAL;
    if (exponent == 0) return sign * ldexp(digits, 1 - bias - fraction);
    return sign * ldexp((1 << fraction) + digits, exponent - bias - fraction);
}

static void narrow_check(void)
{
    for (int kind = 0; kind < 2; kind++) {
        const int fraction = kind ? 7 : 10;
        const mil_dtype dtype = kind ? MIL_BF16 : MIL_F16;
        for (size_t shift = 0; shift < 2; shift++) {       // in bytes
            unsigned char *src = (unsigned char *)guarded(2 * 65536, shift);
            mil_real *dst = reals(65536, (int)shift);
            int64_t wrong = 0;
            for (unsigned h = 0; h < 65536; h++) {
                const uint16_t word = (uint16_t)h;
                memcpy(src + 2 * h, &word, 2);
            }
            mili_convert(K, dst, src, dtype, 65536);
            for (unsigned h = 0; h < 65536; h++) {
                const double want = narrow_value(h, fraction);
                if (want != want) wrong += !is_nan(dst[h]);
                else wrong += (double)dst[h] != want || !signbit(dst[h]) != !(h & 0x8000);
            }
            CHECK(wrong == 0);
            // Pieces of any length, wherever they begin.
            for (int64_t n = 0; n <= SIZE_MAX_HERE; n++) {
                const int64_t at = draw_below(65536 - n);
                unsigned char *piece = (unsigned char *)guarded(2 * (size_t)n, shift);
                mil_real *y = reals(n, (int)shift);
                memcpy(piece, src + 2 * at, 2 * (size_t)n);
                (kind ? K->from_bf16 : K->from_f16)(y, piece, n);
                wrong += !same_bits(y, dst + at, n);
                y = reals(n, (int)shift);
                mili_convert(K, y, piece, dtype, n);
                wrong += !same_bits(y, dst + at, n);
                wrong += !guards_hold_from(2);             // src and dst stay
            }
            CHECK(wrong == 0);
            CHECK(guards_hold());
        }
    }
}
TEST(all_16_bit_floats_become_their_values) { each_tier(narrow_check); }

// Each dtype of whole numbers and of floats at its ends, `shift` bytes off, in pieces of any length.
#define WHOLE(dtype, type, low, high)                                                      \
    for (int64_t n = 0; n <= SIZE_MAX_HERE; n++)                                           \
        for (size_t shift = 0; shift < 4; shift++) {                                       \
            unsigned char *src = (unsigned char *)guarded((size_t)n * sizeof(type), shift); \
            mil_real *dst = reals(n, (int)(shift & 1)), want[SIZE_MAX_HERE];               \
            for (int64_t i = 0; i < n; i++) {                                              \
                const uint64_t bits = (uint64_t)draw_bits() << 32 | draw_bits();           \
                type x = (type)bits;                                                       \
                if (i % 5 == 0) x = (type)(low);                                           \
                if (i % 5 == 1) x = (type)(high);                                          \
                want[i] = (mil_real)x;                                                     \
                memcpy(src + (size_t)i * sizeof x, &x, sizeof x);                          \
            }                                                                              \
            mili_convert(K, dst, src, dtype, n);                                           \
            CHECK(same_bits(dst, want, n));                                                \
            CHECK(guards_hold());                                                          \
        }

static void dtypes_check(void)
{
    WHOLE(MIL_I8, int8_t, INT8_MIN, INT8_MAX)
    WHOLE(MIL_U8, uint8_t, 0, UINT8_MAX)
    WHOLE(MIL_I16, int16_t, INT16_MIN, INT16_MAX)
    WHOLE(MIL_U16, uint16_t, 0, UINT16_MAX)
    WHOLE(MIL_I32, int32_t, INT32_MIN, INT32_MAX)
    WHOLE(MIL_U32, uint32_t, 0, UINT32_MAX)
    WHOLE(MIL_I64, int64_t, INT64_MIN, INT64_MAX)
    WHOLE(MIL_U64, uint64_t, 0, UINT64_MAX)
    WHOLE(MIL_F32, float, FLT_MIN, -FLT_MAX)
    WHOLE(MIL_F64, double, FLT_MIN, -FLT_MAX)
    for (int64_t n = 0; n <= SIZE_MAX_HERE; n++) {
        unsigned char *src = (unsigned char *)guarded((size_t)n, 1);
        mil_real *dst = reals(n, 1);
        int64_t wrong = 0;
        for (int64_t i = 0; i < n; i++) src[i] = (unsigned char)(i % 3 ? draw_bits() : 0);
        mili_convert(K, dst, src, MIL_BOOL, n);
        for (int64_t i = 0; i < n; i++) wrong += dst[i] != (src[i] ? 1 : 0);
        CHECK(wrong == 0);
        CHECK(guards_hold());
    }
}
TEST(every_dtype_is_converted_from_any_address) { each_tier(dtypes_check); }

// ---- how exact the vector maths are -----------------------------------------------------------------------------------
enum { CHUNK = 4096 };
static mil_real sweep_x[CHUNK], sweep_y[CHUNK];
static wide sweep_want[CHUNK];

typedef struct { double worst, at; int64_t wrong; } sweep_state;
static sweep_state sweeps[5][MAPS];

static void sweep_chunk(int count)
{
    for (int f = 0; f < RELU; f++) {
        for (int i = 0; i < count; i++) sweep_want[i] = map_wide(f, (wide)sweep_x[i]);
        for (int tier = MIL_CPU_PLAIN; tier <= MIL_CPU_NEON; tier++) {
            K = mili_kernels_choose((mil_cpu)tier);
            if (!K) continue;
            sweep_state *s = &sweeps[tier][f];
            map_of(K, f)(sweep_y, sweep_x, count);
            for (int i = 0; i < count; i++) {
                const double e = bounds[f].absolute > 0 ? (double)WIDE(fabs)((wide)sweep_y[i] - sweep_want[i]) : ulps(sweep_y[i], sweep_want[i]);
                if (e > s->worst) s->worst = e, s->at = (double)sweep_x[i];
                if (!map_holds(f, sweep_x[i], sweep_y[i], sweep_want[i]) && s->wrong++ < 3) printf("%s %s of %.9g is %.9g, not %.9g\n", K->name, map_name[f], (double)sweep_x[i], (double)sweep_y[i], (double)sweep_want[i]);
            }
        }
    }
}

static int sweep_count;
static void sweep_put(mil_real x)
{
    sweep_x[sweep_count++] = x;
    if (sweep_count == CHUNK) {
        sweep_chunk(CHUNK);
        sweep_count = 0;
    }
}

// All bit patterns by a prime step (subnormals, infinities, NaN among them), and evenly where the functions bend.
TEST(vector_maths_keep_to_the_stated_error_bounds)
{
    static const double ends[] = { 0, 1, 0.9, 10, 15, 88.72283, 88.72284, 89, 103.9720, 103.9721, 104, 1000 };
#if MIL_REAL_IS_FLOAT
    for (uint64_t bits = 0; bits <= 0xffffffffu; bits += 2999) {
        const uint32_t u = (uint32_t)bits;
        float x;
        memcpy(&x, &u, sizeof x);
        sweep_put(x);
    }
    for (int i = -600000; i <= 600000; i++) sweep_put((mil_real)i * (1.0f / 40000));
    for (int i = -110000; i <= 110000; i++) sweep_put((mil_real)i * 0.001f);
#else
    for (uint64_t bits = 0, step = 0x7fffffffffffu; bits < UINT64_MAX - step; bits += step) {
        mil_real x;
        memcpy(&x, &bits, sizeof x);
        sweep_put(x);
    }
    for (int i = -100000; i <= 100000; i++) sweep_put(i * (1.0 / 5000));
#endif
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        sweep_put((mil_real)ends[i]);
        sweep_put((mil_real)-ends[i]);
    }
    sweep_put(INF);
    sweep_put(-INF);
    sweep_put(NOT);
    sweep_put(-NOT);
    sweep_chunk(sweep_count);
    for (int tier = MIL_CPU_PLAIN; tier <= MIL_CPU_NEON; tier++)
        for (int f = 0; f < RELU && mili_kernels_choose((mil_cpu)tier); f++) {
            const sweep_state *s = &sweeps[tier][f];
            if (!CHECK(s->wrong == 0)) printf("%s %s: %d wrong, worst %.3g at %.9g\n", mili_kernels_choose((mil_cpu)tier)->name, map_name[f], (int)s->wrong, s->worst, s->at);
        }
}

TESTS(T(gemm_has_the_right_values_and_the_same_bits_in_any_company)
      T(gemm_of_pairs_is_that_of_numbers_rounded_to_bfloat)
      T(pairs_are_rounded_to_nearest)
      T(maps_give_each_number_its_own_result_at_every_size)
      T(zips_give_each_pair_its_own_result_at_every_size)
      T(updates_give_each_number_its_own_result_at_every_size)
      T(folds_see_every_number_once_and_every_nan)
      T(softmax_of_a_row_sums_to_one_or_is_all_zeros)
      T(all_16_bit_floats_become_their_values)
      T(every_dtype_is_converted_from_any_address)
      T(vector_maths_keep_to_the_stated_error_bounds))
