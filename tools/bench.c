// Speed and memory of mil.h beside its peers: one table from one run.
//
//   build/release/bench [SECTION...]      gemm score bf16 memory train stream cold files models; none: all
//     PYTHON=...       the interpreter that has the peers (default python3); what it lacks is reported as not installed
//     BENCH_QUICK=1    fewer repetitions, no bags over 10,000 patches
//     BENCH_THREADS=n  the most threads, default 2
//
// Every contender is a process of its own that answers one request per line: mil.h (this program with --serve), mil.h over a
// CBLAS (the same program built with MIL_USE_CBLAS), and tools/bench.py for PyTorch, ONNX Runtime and NumPy. They take
// turns, so that a busy machine is busy for all of them. A ratio is printed only for a peer that did the work in this run
// and came to the same logits. Figures are medians of all repetitions, with the smallest and the largest.
//
// The limit is measured in the same turns: fused multiply-adds on registers, on as many threads.

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#define MIL_IMPLEMENTATION
#include "mil.h"
#ifdef MIL_USE_CBLAS
#include <cblas.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { D = 1024, MAX_TIMES = 2048, LINE = 1 << 16, OUTPUTS = 8 };

MIL_PRINTF(1, 2) static void die(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fflush(stdout);
    fputs("bench: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    exit(1);
}

static void *need(void *p)
{
    if (!p) die("out of memory");
    return p;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// On one thread: CPU time of the process, which is wall time on an idle machine, and does not count what others take on a
// busy one. On several: wall time.
static double clock_for(int threads)
{
    struct timespec t;
    clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- series of measurements ------------------------------------------------------------------------------------------
typedef struct series { int count; double value[MAX_TIMES]; } series;

static void series_add(series *s, double v) { if (s->count < MAX_TIMES) s->value[s->count++] = v; }

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double series_at(series *s, double quantile)
{
    if (s->count == 0) return 0;
    qsort(s->value, (size_t)s->count, sizeof *s->value, compare_doubles);
    return s->value[(int)(quantile * (s->count - 1) + 0.5)];
}
static double median(series *s) { return series_at(s, 0.5); }
static double limit(series *s) { return series_at(s, 1); }  // of a limit's measurements the largest: whatever comes between lowers it

// ---- the machine's limit: twelve chains of fused multiply-adds that stay in registers ---------------------------------
#define CHAINS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define CHAIN_START(i) c##i = x;
#define CHAIN_STEP(i) c##i = FMA(c##i, x, y); __asm__ volatile("" : HOLD(c##i));
#define CHAIN_USE(i) out[i] = FIRST(c##i);

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static double fma_avx512(int64_t turns, volatile float *out)
{
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define HOLD(v) "+v"(v)
#define FIRST(v) _mm_cvtss_f32(_mm512_castps512_ps128(v))
    const __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(0.001f);
    __m512 c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11;
    CHAINS(CHAIN_START)
    for (int64_t t = 0; t < turns; t++) { CHAINS(CHAIN_STEP) }
    CHAINS(CHAIN_USE)
    return (double)turns * 12 * 16 * 2;
#undef FMA
#undef FIRST
}
__attribute__((target("avx2,fma"))) static double fma_avx2(int64_t turns, volatile float *out)
{
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FIRST(v) _mm_cvtss_f32(_mm256_castps256_ps128(v))
    const __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(0.001f);
    __m256 c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11;
    CHAINS(CHAIN_START)
    for (int64_t t = 0; t < turns; t++) { CHAINS(CHAIN_STEP) }
    CHAINS(CHAIN_USE)
    return (double)turns * 12 * 8 * 2;
#undef FMA
#undef FIRST
#undef HOLD
}
#elif defined(__aarch64__)
static double fma_neon(int64_t turns, volatile float *out)
{
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define HOLD(v) "+w"(v)
#define FIRST(v) vgetq_lane_f32(v, 0)
    const float32x4_t x = vdupq_n_f32(0.999f), y = vdupq_n_f32(0.001f);
    float32x4_t c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11;
    CHAINS(CHAIN_START)
    for (int64_t t = 0; t < turns; t++) { CHAINS(CHAIN_STEP) }
    CHAINS(CHAIN_USE)
    return (double)turns * 12 * 4 * 2;
#undef FMA
#undef FIRST
#undef HOLD
}
#endif

static char cpu_kernels[16];                               // the tier that mil.h runs here

static void *fma_thread(void *arg)
{
    double *flop = (double *)arg;
    volatile float out[12];
    const int64_t turns = 10000000;            // some 30 ms: starting a thread counts for little
    *flop = 0;
#if defined(__x86_64__)
    if (!strcmp(cpu_kernels, "avx512")) *flop = fma_avx512(turns, out);
    else if (!strcmp(cpu_kernels, "avx2")) *flop = fma_avx2(turns, out);
#elif defined(__aarch64__)
    *flop = fma_neon(turns, out);
#endif
    (void)out;
    return NULL;
}

// GFLOP/s on so many threads; 0 where there is no such loop.
static double fma_peak(int threads)
{
    pthread_t thread[64];
    double flop[64], sum = 0;
    if (threads > 64) threads = 64;
    const double begin = clock_for(threads);
    for (int i = 1; i < threads; i++) if (pthread_create(&thread[i], NULL, fma_thread, &flop[i])) die("no thread");
    fma_thread(&flop[0]);
    for (int i = 1; i < threads; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < threads; i++) sum += flop[i];
    return sum / (clock_for(threads) - begin) * 1e-9;
}

// Bytes read from memory per second, by so many threads, GB/s.
typedef struct read_job { const uint64_t *words; size_t count; uint64_t sum; } read_job;
static void *read_thread(void *arg)
{
    read_job *job = (read_job *)arg;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i + 32 <= job->count; i += 32)      // a word of each cache line is enough to bring it in
        a += job->words[i], b += job->words[i + 8], c += job->words[i + 16], d += job->words[i + 24];
    job->sum = a + b + c + d;
    return NULL;
}
static double read_rate(int threads)
{
    const size_t count = (size_t)32 << 20;
    uint64_t *words = (uint64_t *)need(malloc(count * 8));
    memset(words, 1, count * 8);
    series s;
    s.count = 0;
    for (int r = 0; r < 5; r++) {
        pthread_t thread[64];
        read_job job[64];
        const double begin = now();
        for (int i = 0; i < threads; i++) {
            job[i].words = words + count / (size_t)threads * (size_t)i;
            job[i].count = count / (size_t)threads;
            if (i && pthread_create(&thread[i], NULL, read_thread, &job[i])) die("no thread");
        }
        read_thread(&job[0]);
        for (int i = 1; i < threads; i++) pthread_join(thread[i], NULL);
        series_add(&s, (double)count * 8 / (now() - begin) * 1e-9);
    }
    free(words);
    return median(&s);
}

// ---- memory ------------------------------------------------------------------------------------------------------------
static int64_t memory_line(const char *key)
{
    char line[256];
    long long kib = 0;
    FILE *f = fopen("/proc/self/status", "r");
    if (!f) return 0;
    while (fgets(line, sizeof line, f))
        if (!strncmp(line, key, strlen(key)) && line[strlen(key)] == ':') sscanf(line + strlen(key) + 1, "%lld", &kib);
    fclose(f);
    return (int64_t)kib * 1024;
}

// Sets the high-water mark back to what the process holds now, which is returned; -1 where the system cannot.
static int64_t memory_mark(void)
{
#ifdef __GLIBC__
    malloc_trim(0);
#endif
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (!f) return -1;
    fputs("5", f);
    if (fclose(f)) return -1;
    return memory_line("VmRSS");
}
static int64_t memory_since(int64_t mark) { return mark < 0 ? 0 : memory_line("VmHWM") - mark; }

// ======================================================================================================================
// The server: mil.h as one of the contenders.

typedef struct server {
    mil_context *ctx;
    mil_precision precision;
    int       threads;
    char      model_name[64], weights[512], features[512];
    mil_model *model;
    char      key[256];                                    // the request that what follows was made for
    void     *x;                                           // features
    int64_t   rows;
    mil_dtype dtype;
    mil_scorer *scorer;
    mil_trainer *trainer;
    mil_tape *tape;
    float    *a, *b, *c;                                   // gemm
    int64_t   peak;
} server;

static void server_drop(server *s)
{
    mil_scorer_free(s->scorer);
    mil_trainer_free(s->trainer);
    mil_tape_free(s->tape);
    s->scorer = NULL;
    s->trainer = NULL;
    s->tape = NULL;
    free(s->x);
    free(s->a);
    free(s->b);
    free(s->c);
    s->x = NULL;
    s->a = s->b = s->c = NULL;
    s->key[0] = 0;
}

static int server_threads(server *s, int threads)
{
    mil_context_options o = mil_context_options_default();
    o.precision = s->precision;
    server_drop(s);
    mil_model_free(s->model);
    s->model = NULL;
    mil_context_free(s->ctx);
    o.threads = s->threads = threads;
#ifdef MIL_USE_CBLAS
    openblas_set_num_threads(threads);
#endif
    return mil_context_create(&s->ctx, &o) == MIL_OK;
}

static uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
static uint16_t to_f16(float x)                            // of numbers in +-60000; below the normal ones: 0
{
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    if (u < 0x38800000u) return (uint16_t)sign;
    return (uint16_t)(sign | ((u - 0x38000000u + 0xfffu + (u >> 13 & 1)) >> 13));
}

static int server_features(server *s, int64_t n, const char *dtype)
{
    FILE *f = fopen(s->features, "rb");
    float *x = (float *)need(malloc((size_t)n * D * 4));
    const size_t got = f ? fread(x, 4, (size_t)n * D, f) : 0;
    if (f) fclose(f);
    if (got != (size_t)n * D) { free(x); return 0; }
    s->x = x;
    s->rows = n;
    s->dtype = !strcmp(dtype, "f16") ? MIL_F16 : !strcmp(dtype, "bf16") ? MIL_BF16 : MIL_F32;
    if (s->dtype == MIL_F32) return 1;
    uint16_t *y = (uint16_t *)need(malloc((size_t)n * D * 2));
    for (int64_t i = 0; i < n * D; i++) y[i] = s->dtype == MIL_F16 ? to_f16(x[i]) : to_bf16(x[i]);
    free(x);
    s->x = y;
    return 1;
}

// One repetition of the request that was prepared. Returns the seconds, or a negative number.
typedef struct work { char verb[16]; int64_t n, piece; double out[OUTPUTS]; int out_count; } work;

static double server_once(server *s, work *w)
{
    mil_real logits[OUTPUTS];
    const int64_t classes = s->model ? mil_model_num_classes(s->model) : 0;
    int ok = 1;
    double begin = clock_for(s->threads), end;
    w->out_count = 0;
    if (!strcmp(w->verb, "gemm")) {
        ok = mil_tape_rerun(s->tape) == MIL_OK;
        return ok ? clock_for(s->threads) - begin : -1;
    }
    if (!strcmp(w->verb, "train") || !strcmp(w->verb, "lean")) {             // lean: row values are computed again, not stored
        mil_bag bag = mil_bag_make(NULL, w->n, D);
        mil_target target = mil_target_class(1);
        double loss = 0;
        bag.features = mil_tensor_matrix(s->x, s->dtype, w->n, D);
        begin = clock_for(s->threads);
        if (!s->trainer) s->trainer = mil_trainer_create(s->model, "optimizer=adamw lr=0.0001 weight_decay=0.01");
        if (s->trainer && w->verb[0] == 'l') mil_tape_set(mil_trainer_tape(s->trainer), MIL_TAPE_RECOMPUTE, 1);
        ok = s->trainer && mil_trainer_step(s->trainer, &bag, &target, &loss, NULL) == MIL_OK;
        end = clock_for(s->threads);
        w->out[w->out_count++] = loss;
        return ok ? end - begin : -1;
    }
    begin = clock_for(s->threads);
    if (!s->scorer) {
        mil_scorer_options o = mil_scorer_options_default();
        if (!strcmp(w->verb, "chunks")) o.capacity = w->n;
        s->scorer = mil_scorer_create(s->model, &o);
        if (!s->scorer) return -1;
    }
    if (!strcmp(w->verb, "score")) {
        mil_bag bag = mil_bag_make(NULL, w->n, D);
        bag.features = mil_tensor_matrix(s->x, s->dtype, w->n, D);
        ok = mil_scorer_score(s->scorer, &bag) == MIL_OK;
    } else if (!strcmp(w->verb, "tail")) {                 // a push onto a bag of n rows, and its logits
        mil_scorer_reset(s->scorer);
        ok = mil_scorer_push(s->scorer, s->x, w->n, 0, s->dtype) == MIL_OK && mil_scorer_read(s->scorer, MIL_LOGITS, logits, classes) == MIL_OK;
        begin = clock_for(s->threads);
        ok = ok && mil_scorer_push(s->scorer, s->x, w->piece, 0, s->dtype) == MIL_OK;
    } else {                                               // by pieces; chunks: the same few rows again and again
        mil_scorer_reset(s->scorer);
        for (int64_t at = 0; ok && at < w->n; at += w->piece) {
            const int64_t count = w->piece < w->n - at ? w->piece : w->n - at;
            const size_t row = D * mil_dtype_size(s->dtype);
            const char *from = (const char *)s->x + (size_t)(at % s->rows) * row;
            ok = mil_scorer_push(s->scorer, from, count, 0, s->dtype) == MIL_OK;
        }
    }
    ok = ok && classes <= OUTPUTS && mil_scorer_read(s->scorer, MIL_LOGITS, logits, classes) == MIL_OK;
    end = clock_for(s->threads);
    for (int64_t i = 0; i < classes; i++) w->out[w->out_count++] = (double)logits[i];
    return ok ? end - begin : -1;
}

static void fill(float *x, int64_t count, uint64_t seed)   // normal(0, 1), about: a sum of four uniforms
{
    uint64_t u = seed * 2862933555777941757u + 3037000493u;
    for (int64_t i = 0; i < count; i++) {
        double sum = -2;
        for (int j = 0; j < 4; j++) {
            u = u * 6364136223846793005u + 1442695040888963407u;
            sum += (double)(u >> 40) * 0x1p-24;
        }
        x[i] = (float)(sum * 1.7320508);
    }
}

// nt: x W^T, tn: x^T y, nn: x W. Both operands and the result lie in memory; nothing is packed beforehand.
static int gemm_prepare(server *s, const char *kind, int64_t m, int64_t n, int64_t k)
{
    const int ta = !strcmp(kind, "tn"), tb = !strcmp(kind, "nt");
    s->a = (float *)need(malloc((size_t)(m * k) * 4));
    s->b = (float *)need(malloc((size_t)(n * k) * 4));
    fill(s->a, m * k, 1);
    fill(s->b, n * k, 2);
    const mil_tensor a = mil_tensor_matrix(s->a, MIL_F32, ta ? k : m, ta ? m : k);
    const mil_tensor b = mil_tensor_matrix(s->b, MIL_F32, tb ? n : k, tb ? k : n);
    if (mil_tape_create(s->ctx, &s->tape) != MIL_OK) return 0;
    mil_node_keep(mil_matmul_t(mil_input(s->tape, "a", &a), mil_input(s->tape, "b", &b), ta, tb));
    return mil_tape_run(s->tape) == MIL_OK;
}

#ifdef MIL_USE_CBLAS
// The CBLAS itself, without mil.h.
static double blas_once(server *s, const char *kind, int m, int n, int k)
{
    const int ta = !strcmp(kind, "tn"), tb = !strcmp(kind, "nt");
    const double begin = clock_for(s->threads);
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, m, n, k, 1.0f, s->a, ta ? m : k, s->b, tb ? k : n, 0.0f, s->c, n);
    return clock_for(s->threads) - begin;
}
#endif

static void answer_error(server *s)
{
    printf("no %s\n", s->ctx && mil_error(s->ctx)[0] ? mil_error(s->ctx) : "failed");
    fflush(stdout);
}

static int serve(void)
{
    static char line[LINE], copy[LINE];
    server s;
    memset(&s, 0, sizeof s);
    if (!server_threads(&s, 1)) die("no context");
#ifdef MIL_USE_CBLAS
    printf("ok mil.h %s over CBLAS: %s, kernels %s\n", mil_version(), openblas_get_config(), openblas_get_corename());
#else
    printf("ok mil.h %s, kernels %s\n", mil_version(), mil_context_cpu(s.ctx));
#endif
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        char *word[8] = { NULL };
        int words = 0;
        line[strcspn(line, "\n")] = 0;
        memcpy(copy, line, sizeof copy);
        for (char *p = strtok(copy, " "); p && words < 8; p = strtok(NULL, " ")) word[words++] = p;
        if (words == 0) continue;
        if (!strcmp(word[0], "threads") && words == 2) {
            puts(server_threads(&s, atoi(word[1])) ? "ok" : "no context");
            fflush(stdout);
            continue;
        }
        if (!strcmp(word[0], "precision") && words == 2) { // a new context, as for other threads: load again
            s.precision = strcmp(word[1], "bf16") ? MIL_PRECISION_FULL : MIL_PRECISION_BF16;
            if (!server_threads(&s, s.threads)) puts("no context");
            else puts(mil_context_precision(s.ctx) == s.precision ? "ok" : "no bfloat16 products on this CPU");
            fflush(stdout);
            continue;
        }
        if (!strcmp(word[0], "drop")) {
            server_drop(&s);
            puts("ok");
            fflush(stdout);
            continue;
        }
        if ((!strcmp(word[0], "load") || !strcmp(word[0], "make")) && words == 4) {        // make: fresh weights, written there
            server_drop(&s);
            mil_model_free(s.model);
            snprintf(s.features, sizeof s.features, "%s", word[3]);
            s.model = mil_create(s.ctx, word[1], NULL);
            if (!s.model || (word[0][0] == 'm' ? mil_save(s.model, word[2]) : mil_load(s.model, word[2])) != MIL_OK) { answer_error(&s); continue; }
            puts("ok");
            fflush(stdout);
            continue;
        }
        if (words < 5 || (strcmp(word[0], "gemm") && !s.model)) { puts("no such request"); fflush(stdout); continue; }
        const int reps = atoi(word[words - 1]);
        work w;
        memset(&w, 0, sizeof w);
        snprintf(w.verb, sizeof w.verb, "%.15s", word[0]);
        w.n = !strcmp(w.verb, "gemm") ? 0 : atoll(word[2]);
        w.piece = words > 5 ? atoll(word[4]) : 256;
        *strrchr(line, ' ') = 0;
        double first = -1;
        int ok = 1;
        if (strcmp(s.key, line) != 0) {
            server_drop(&s);
            if (!strcmp(w.verb, "gemm")) {
                const int64_t m = atoll(word[2]), n = atoll(word[3]), k = atoll(word[4]);
                ok = gemm_prepare(&s, word[1], m, n, k);
#ifdef MIL_USE_CBLAS
                s.c = (float *)need(calloc((size_t)(m * n), 4));
                blas_once(&s, word[1], (int)m, (int)n, (int)k);
#endif
            } else {
                if (!server_features(&s, !strcmp(w.verb, "chunks") ? w.piece : w.n, word[3])) { puts("no features"); fflush(stdout); continue; }
                const int64_t mark = memory_mark();
                first = server_once(&s, &w);
                ok = first >= 0;
                if (ok && reps) ok = server_once(&s, &w) >= 0;         // the second one is warm
                s.peak = memory_since(mark);
            }
            if (ok) snprintf(s.key, sizeof s.key, "%.255s", line);
        }
        series times;
        times.count = 0;
        if (reps == 0 && ok) series_add(&times, first >= 0 ? first : server_once(&s, &w));
        for (int r = 0; r < reps && ok; r++) {
            double t;
#ifdef MIL_USE_CBLAS
            if (!strcmp(w.verb, "gemm")) t = blas_once(&s, word[1], atoi(word[2]), atoi(word[3]), atoi(word[4]));
            else
#endif
            t = server_once(&s, &w);
            ok = t >= 0;
            series_add(&times, t);
        }
        if (!ok) { answer_error(&s); server_drop(&s); continue; }
        printf("ok peak %lld out", (long long)s.peak);
        for (int i = 0; i < w.out_count; i++) printf(" %.9g", w.out[i]);
        printf(" times");
        for (int i = 0; i < times.count; i++) printf(" %.9g", times.value[i]);
        printf("\n");
        fflush(stdout);
    }
    server_drop(&s);
    mil_model_free(s.model);
    mil_context_free(s.ctx);
    return 0;
}

// A fresh process: weights, one bag, logits.
static int cold(char **argv)
{
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    mil_real logits[OUTPUTS];
    const int64_t n = atoll(argv[3]);
    o.threads = 1;
    if (mil_context_create(&ctx, &o) != MIL_OK) return 1;
    mil_model *model = mil_create(ctx, argv[0], NULL);
    if (!model || mil_load(model, argv[1]) != MIL_OK) die("%s", mil_error(ctx));
    float *x = (float *)need(malloc((size_t)n * D * 4));
    FILE *f = fopen(argv[2], "rb");
    if (!f || fread(x, 4, (size_t)n * D, f) != (size_t)n * D) die("%s", argv[2]);
    fclose(f);
    mil_scorer *scorer = mil_scorer_create(model, NULL);
    if (!scorer || mil_scorer_push(scorer, x, n, 0, MIL_F32) != MIL_OK || mil_scorer_read(scorer, MIL_LOGITS, logits, 2) != MIL_OK) die("%s", mil_error(ctx));
    printf("%.6f %.6f\n", (double)logits[0], (double)logits[1]);
    free(x);
    mil_scorer_free(scorer);
    mil_model_free(model);
    mil_context_free(ctx);
    return 0;
}

// ======================================================================================================================
// The referee.

typedef struct contender {
    const char *name, *title;
    char  version[512], reason[160];
    pid_t pid;
    FILE *to, *from;
    int   alive, threads, loaded;
    char  argv[3][1200];
} contender;

enum { MIL, BLAS, TORCH, ONNX, NUMPY, CONTENDERS };
static contender who[CONTENDERS];

static void name_contenders(void)
{
    static const char *const name[] = { "mil.h", "cblas", "torch", "onnxruntime", "numpy" }, *const title[] = { "mil.h", "CBLAS", "PyTorch", "ONNX Runtime", "NumPy" };
    for (int i = 0; i < CONTENDERS; i++) {
        who[i].name = name[i];
        who[i].title = title[i];
    }
}

static const char *python, *here, *script, *folder = "build/bench";
static int quick;

static pid_t spawn(char *const *argv, int in, int out, int quiet)
{
    fflush(stdout);
    const pid_t pid = fork();
    if (pid < 0) die("fork: %s", strerror(errno));
    if (pid) return pid;
    if (in >= 0) dup2(in, 0);
    if (out >= 0) dup2(out, 1);
    if (quiet) {
        const int nothing = open("/dev/null", O_WRONLY);
        dup2(nothing, 2);
        if (out < 0) dup2(nothing, 1);
    }
    execvp(argv[0], argv);
    _exit(127);
}

// One request, one answer. 1 when the answer begins with ok; `reply` holds what follows. Until its next request the contender is
// stopped: the threads of some go on spinning after their work, and would take a core from the next.
static int receive(contender *c, char *reply)
{
    const char *line = fgets(reply, LINE, c->from);
    kill(c->pid, SIGSTOP);
    if (!line) {
        c->alive = 0;
        snprintf(c->reason, sizeof c->reason, "its process ended");
        snprintf(reply, LINE, "%s", c->reason);
        return 0;
    }
    reply[strcspn(reply, "\n")] = 0;
    const int ok = !strncmp(reply, "ok", 2);
    memmove(reply, reply + (strlen(reply) > 2 ? 3 : strlen(reply)), strlen(reply) + 1 - (strlen(reply) > 2 ? 3 : strlen(reply)));
    return ok;
}

MIL_PRINTF(3, 4) static int ask(contender *c, char *reply, const char *format, ...)
{
    va_list list;
    if (!c->alive) {
        snprintf(reply, LINE, "%s", c->reason);
        return 0;
    }
    kill(c->pid, SIGCONT);
    va_start(list, format);
    vfprintf(c->to, format, list);
    va_end(list);
    fputc('\n', c->to);
    fflush(c->to);
    return receive(c, reply);
}

static void start(contender *c, char *const *argv)
{
    static char reply[LINE];
    int to[2], from[2];
    for (int i = 0; i < 3 && argv[i]; i++) if (argv[i] != c->argv[i]) snprintf(c->argv[i], sizeof c->argv[i], "%s", argv[i]);
    if (pipe(to) || pipe(from)) die("pipe: %s", strerror(errno));
    fcntl(to[1], F_SETFD, FD_CLOEXEC);
    fcntl(from[0], F_SETFD, FD_CLOEXEC);
    c->pid = spawn(argv, to[0], from[1], 1);
    close(to[0]);
    close(from[1]);
    c->to = fdopen(to[1], "w");
    c->from = fdopen(from[0], "r");
    c->alive = 1;
    c->threads = c->loaded = 0;
    if (!c->to || !c->from || !receive(c, reply)) {
        c->alive = 0;
        snprintf(c->reason, sizeof c->reason, "not installed");
    } else snprintf(c->version, sizeof c->version, "%.511s", reply);
}

static void stop(contender *c)
{
    if (!c->pid) return;
    kill(c->pid, SIGCONT);
    if (c->to) fclose(c->to);
    if (c->from) fclose(c->from);
    waitpid(c->pid, NULL, 0);
    c->pid = 0;
}

// One that ran and then died (of too much memory, say) is started again for the next measurement.
static void revive(contender *c)
{
    if (c->alive || !c->version[0]) return;
    char *argv[4] = { c->argv[0], c->argv[1], c->argv[2][0] ? c->argv[2] : NULL, NULL };
    stop(c);
    start(c, argv);
}

// ---- one measurement of everybody, in turns ---------------------------------------------------------------------------
typedef struct result {
    int     ran;
    series  time;
    double  out[OUTPUTS];
    int     out_count;
    int64_t peak;
    char    reason[128];
} result;

static void read_result(result *r, const char *reply)
{
    const char *p = strstr(reply, "times");
    char *end;
    long long peak = 0;
    sscanf(reply, "peak %lld", &peak);
    r->peak = (int64_t)peak;
    for (p = p ? p + 5 : ""; *p; p = end) {
        const double t = strtod(p, &end);
        if (end == p) break;
        series_add(&r->time, t);
    }
    r->out_count = 0;
    p = strstr(reply, " out");
    for (p = p ? p + 4 : ""; *p && r->out_count < OUTPUTS; p = end) {
        const double v = strtod(p, &end);
        if (end == p) break;
        r->out[r->out_count++] = v;
    }
}

// Everybody in `mask` answers `request`, for `seconds` each, about, on so many threads. fma: the limit meanwhile, or NULL.
static void measure(result *r, series *fma, unsigned mask, int threads, double seconds, int once, const char *request)
{
    static char reply[LINE];
    int reps[CONTENDERS], rounds = 2;
    double longest = 0;
    memset(r, 0, CONTENDERS * sizeof *r);
    if (fma) fma->count = 0;
    for (int round = 0; round < rounds; round++) {
        if (fma) series_add(fma, fma_peak(threads));
        for (int i = 0; i < CONTENDERS; i++) {
            contender *c = &who[i];
            if (!(mask >> i & 1)) { snprintf(r[i].reason, sizeof r[i].reason, "not asked"); continue; }
            if (!round) revive(c);
            if (round && !r[i].ran) continue;
            if (!c->alive) { snprintf(r[i].reason, sizeof r[i].reason, "%.127s", c->reason); continue; }
            if (c->threads != threads && !ask(c, reply, "threads %d", threads)) { snprintf(r[i].reason, sizeof r[i].reason, "%.127s", reply); continue; }
            if (c->threads != threads && i <= BLAS) c->loaded = 0;
            c->threads = threads;
            if (strncmp(request, "gemm", 4) != 0 && !c->loaded) {
                if (!ask(c, reply, "load %s", who[MIL].reason)) { snprintf(r[i].reason, sizeof r[i].reason, "%.127s", reply); continue; }
                c->loaded = 1;
            }
            const int count = once ? 0 : round ? reps[i] : 1;
            if (!ask(c, reply, "%s %d", request, count)) { snprintf(r[i].reason, sizeof r[i].reason, "%.127s", reply); r[i].ran = 0; continue; }
            r[i].ran = 1;
            read_result(&r[i], reply);
            if (round == 0) {
                const double t = r[i].time.value[0];
                if (t > longest) longest = t;
                reps[i] = t > 0.1 ? 1 : t > 0.001 ? (int)(0.1 / t) + 1 : 100;
                if (t > 0.1) r[i].time.value[0] = t;
                else r[i].time.count = 0;                  // short ones: the first is not counted
            }
        }
        if (once) rounds = 1;
        else if (round == 0) {
            const double turn = longest > 0.1 ? longest : 0.1;
            rounds = 1 + (int)(seconds / turn);
            if (rounds < 3) rounds = 3;
            if (rounds > 15) rounds = 15;
        }
    }
    if (!strncmp(request, "train", 5) || !strncmp(request, "lean", 4)) who[MIL].loaded = who[BLAS].loaded = 0;     // their weights are others now
}

static void drop_all(void)
{
    static char reply[LINE];
    for (int i = 0; i < CONTENDERS; i++) if (who[i].alive) ask(&who[i], reply, "drop");
}

// who[MIL].reason carries the arguments of `load`: mil.h never fails to start.
static void use_model(const char *model, const char *weights, const char *features)
{
    static char reply[LINE];
    drop_all();
    if (!ask(&who[MIL], reply, "make %s %s %s", model, weights, features)) die("%s: %s", model, reply);
    snprintf(who[MIL].reason, sizeof who[MIL].reason, "%s %s %s", model, weights, features);
    for (int i = 0; i < CONTENDERS; i++) who[i].loaded = 0;
    who[MIL].loaded = 1;
}

// Whether a contender came to mil.h's logits, to 1e-3 of their size.
static int agrees(const result *a, const result *b)
{
    if (a->out_count != b->out_count) return 0;
    for (int i = 0; i < a->out_count; i++) if (!(fabs(a->out[i] - b->out[i]) <= 1e-3 * (1 + fabs(a->out[i])))) return 0;
    return 1;
}

static const char *spread(series *s)
{
    static char text[4][64];
    static int at;
    char *t = text[at++ % 4];
    const double m = median(s) * 1e3;
    const int digits = m < 1 ? 3 : m < 10 ? 2 : m < 100 ? 1 : 0;
    snprintf(t, 64, "%.*f (%.*f..%.*f)", digits, m, digits, series_at(s, 0) * 1e3, digits, series_at(s, 1) * 1e3);
    return t;
}

static const char *mebibytes(int64_t bytes)
{
    static char text[4][32];
    static int at;
    char *t = text[at++ % 4];
    if (bytes <= 0) snprintf(t, 32, "?");
    else snprintf(t, 32, "%.1f", (double)bytes / 1048576);
    return t;
}

// ratio = the peer's time over mil.h's; says why there is none.
static void print_peer(result *r, int i, int check, int memory)
{
    if (!(r[i].ran && r[i].time.count)) printf(" %s |", r[i].reason);
    else if (check && !agrees(&r[MIL], &r[i])) printf(" %s, other logits |", spread(&r[i].time));
    else {
        printf(" %s: **%.2f**", spread(&r[i].time), median(&r[i].time) / median(&r[MIL].time));
        if (memory) printf(", %s MiB", mebibytes(r[i].peak));
        printf(" |");
    }
}

// What the roofline shows.
typedef struct point { char name[48]; double intensity, rate; int kind; } point;
static point points[64];
static int point_count;
static void add_point(const char *name, int kind, double flop, double bytes, double seconds)
{
    if (point_count == 64 || seconds <= 0) return;
    point *p = &points[point_count++];
    snprintf(p->name, sizeof p->name, "%s", name);
    p->intensity = flop / bytes;
    p->rate = flop / seconds * 1e-9;
    p->kind = kind;
}

static double score_flop(double n) { return n * 2 * (1024.0 * 512 + 2 * 512 * 384 + 384 + 512); }
static double train_flop(double n) { return 2 * score_flop(n) + n * 2 * (2 * 512 * 384 + 384 + 512); }

static int max_threads = 2;
#define EVERY_THREADS(t) for (int t = 1; t <= max_threads; t *= 2)

static void section_gemm(void)
{
    static const struct { const char *kind, *what; int m, n, k; } shape[] = {
        { "nt", "embed: x W^T", 10000, 512, 1024 }, { "nt", "gate: h V^T", 10000, 384, 512 }, { "nn", "dh: dy W", 10000, 512, 384 },
        { "tn", "dW: dy^T x", 512, 1024, 10000 }, { "tn", "dV: dy^T h", 384, 512, 10000 },
    };
    result r[CONTENDERS];
    series fma;
    printf("\n### GEMM at ABMIL's shapes (nothing packed beforehand)\n\n"
           "| product | m, n, k | threads | mil.h ms | GFLOP/s | of FMA peak | CBLAS | PyTorch | ONNX Runtime | NumPy |\n|---|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < (int)(sizeof shape / sizeof *shape); i++)
        EVERY_THREADS(t) {
            char request[128];
            snprintf(request, sizeof request, "gemm %s %d %d %d", shape[i].kind, shape[i].m, shape[i].n, shape[i].k);
            measure(r, &fma, 31, t, quick ? 0.5 : 1.5, 0, request);
            const double flop = 2.0 * shape[i].m * shape[i].n * shape[i].k, rate = flop / median(&r[MIL].time) * 1e-9;
            printf("| %s | %d, %d, %d | %d | %s | %.0f | %.0f %% |", shape[i].what, shape[i].m, shape[i].n, shape[i].k, t, spread(&r[MIL].time), rate,
                   100 * rate / limit(&fma));
            for (int p = 1; p < CONTENDERS; p++) print_peer(r, p, 0, 0);
            printf("\n");
            fflush(stdout);
            if (t == 1 && i == 0) add_point("GEMM 10000 x 512 x 1024", 0, flop, 4.0 * (shape[i].m * (double)(shape[i].k + shape[i].n) + shape[i].n * (double)shape[i].k), median(&r[MIL].time));
        }
    drop_all();
}

static const int bag_sizes[] = { 1000, 10000, 100000 };
static int bag_count(void) { return quick ? 2 : 3; }

static void section_score(void)
{
    result r[CONTENDERS];
    series fma;
    printf("\n### Scoring, abmil.base, fp32, D = 1024 (ms for a bag; peers: ms, **their time / ours**, peak memory beyond the features)\n\n"
           "| N | features | threads | mil.h ms | GFLOP/s | of FMA peak | MiB | over CBLAS | PyTorch | ONNX Runtime | NumPy |\n|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < bag_count(); i++)
        EVERY_THREADS(t)
            for (int d = 0; d < 3; d++) {
                static const char *const dtype[] = { "f32", "f16", "bf16" };
                char request[128];
                if (d && bag_sizes[i] != 10000) continue;
                snprintf(request, sizeof request, "score abmil %d %s", bag_sizes[i], dtype[d]);
                measure(r, &fma, d ? 5 : 31, t, quick ? 1 : 3, 0, request);
                if (!r[MIL].ran) die("%s: %s", request, r[MIL].reason);
                const double rate = score_flop(bag_sizes[i]) / median(&r[MIL].time) * 1e-9;
                printf("| %d | %s | %d | %s | %.0f | %.0f %% | %s |", bag_sizes[i], dtype[d], t, spread(&r[MIL].time), rate, 100 * rate / limit(&fma), mebibytes(r[MIL].peak));
                for (int p = 1; p < CONTENDERS; p++) print_peer(r, p, 1, 1);
                printf("\n");
                fflush(stdout);
                if (t == 1 && bag_sizes[i] == 10000) {
                    char name[64];
                    const double bytes = 10000.0 * D * (d ? 2 : 4) + 4 * 920195.0;
                    snprintf(name, sizeof name, "score %s", dtype[d]);
                    add_point(name, 0, score_flop(10000), bytes, median(&r[MIL].time));
                    for (int p = TORCH; d == 0 && p <= ONNX; p++)
                        if (r[p].ran) { snprintf(name, sizeof name, "%s: score", who[p].title); add_point(name, p, score_flop(10000), bytes, median(&r[p].time)); }
                }
            }
    drop_all();
}

// The label and the logits of class 0 and 1 of each bag in a table of predictions; their number, at most `room`.
static int read_predictions(const char *path, int64_t *label, double *logits, int room)
{
    static char line[LINE];
    FILE *f = fopen(path, "r");
    int count = 0, column[3] = { -1, -1, -1 };
    for (int row = 0; f && fgets(line, sizeof line, f); row++) {
        int at = 0;
        if (row && count == room) break;
        for (char *word = strtok(line, ",\n"); word; word = strtok(NULL, ",\n"), at++) {
            if (row == 0) {
                if (!strcmp(word, "label")) column[0] = at;
                if (!strcmp(word, "logit_0")) column[1] = at;
                if (!strcmp(word, "logit_1")) column[2] = at;
            } else if (at == column[0]) label[count] = !strcmp(word, "tumour");
            else if (at == column[1]) logits[2 * count] = atof(word);
            else if (at == column[2]) logits[2 * count + 1] = atof(word);
        }
        count += row > 0;
    }
    if (f) fclose(f);
    return column[0] < 0 || column[1] < 0 || column[2] < 0 ? 0 : count;
}

// What bfloat16 products change on the demo's cohort: its cross-validated nets on the slides that each did not see.
static void bf16_on_the_cohort(void)
{
    enum { MOST = 1024 };
    static int64_t label[MOST];
    static double logits[2][2 * MOST];
    char tool[1300], table[2][600];
    double auroc[2] = { 0, 0 }, most = 0, sum = 0, size = 0;
    int count = 0;
    mil_context *ctx;
    snprintf(tool, sizeof tool, "%s", here);
    snprintf(strrchr(tool, '/') ? strrchr(tool, '/') + 1 : tool, 8, "mil");
    if (mil_context_create(&ctx, NULL) != MIL_OK) die("no context");
    for (int half = 0; half < 2; half++) {
        static char words[8][32] = { "eval", "--data", "build/demo/data", "--run", "build/demo/run", "--predictions", "--precision" }, kinds[2][8] = { "full", "bf16" };
        int status;
        snprintf(table[half], sizeof table[half], "%s/cohort_%s.csv", folder, kinds[half]);
        char *argv[] = { tool, words[0], words[1], words[2], words[3], words[4], words[5], table[half], words[6], kinds[half], NULL };
        waitpid(spawn(argv, -1, -1, 1), &status, 0);
        count = WIFEXITED(status) && !WEXITSTATUS(status) ? read_predictions(table[half], label, logits[half], MOST) : 0;
        if (!count) { printf("\nNot run on the demo's cohort: no build/demo (make demo)\n"); break; }
        double score[MOST];
        for (int i = 0; i < count; i++) score[i] = logits[half][2 * i + 1] - logits[half][2 * i];
        if (mil_metric_auroc(ctx, score, label, count, &auroc[half]) != MIL_OK) die("%s", mil_error(ctx));
        remove(table[half]);
    }
    for (int i = 0; i < 2 * count; i++) {
        const double d = fabs(logits[1][i] - logits[0][i]);
        if (d > most) most = d;
        sum += d;
        size += fabs(logits[0][i]);
    }
    if (count)
        printf("\nOn the demo's %d slides: logits of mean size %.2f move by %.4f on average, %.4f at most; AUROC %.4f in full, %.4f in bf16.\n", count, size / (2 * count),
               sum / (2 * count), most, auroc[0], auroc[1]);
    mil_context_free(ctx);
}

static void section_bf16(void)
{
    static char reply[LINE];
    contender *c = &who[MIL];
    printf("\n### MIL_PRECISION_BF16: products of bfloat16 summed in float, scoring, abmil.base, N = 10,000\n\n"
           "| threads | features | full ms | bf16 ms | full / bf16 | largest change of a logit |\n|---|---|---|---|---|---|\n");
    EVERY_THREADS(t)
        for (int d = 0; d < 2; d++) {
            result r[2];
            memset(r, 0, sizeof r);
            int ok = 1;
            for (int round = 0; ok && round < (quick ? 6 : 18); round++) {
                const int half = round & 1;
                c->threads = t;
                ok = ask(c, reply, "threads %d", t) && ask(c, reply, "precision %s", half ? "bf16" : "full") && ask(c, reply, "load %s", c->reason) &&
                     ask(c, reply, "score abmil 10000 %s 2", d ? "bf16" : "f32");
                if (ok) read_result(&r[half], reply);
            }
            if (!ok) { printf("| %d | | %s |\n", t, reply); break; }
            double change = 0;
            for (int i = 0; i < r[0].out_count; i++) if (fabs(r[0].out[i] - r[1].out[i]) > change) change = fabs(r[0].out[i] - r[1].out[i]);
            printf("| %d | %s | %s | %s | %.2f | %.5f |\n", t, d ? "bf16" : "f32", spread(&r[0].time), spread(&r[1].time), median(&r[0].time) / median(&r[1].time), change);
            fflush(stdout);
        }
    ask(c, reply, "precision full");
    c->loaded = 0;
    bf16_on_the_cohort();
    fflush(stdout);
}

static void section_memory(void)
{
    result r[CONTENDERS];
    printf("\n### Memory of scoring, abmil.base, rows pushed 4096 at a time (MiB beyond features and weights; peak of the process)\n\n| N | MiB | s | us per patch |\n|---|---|---|---|\n");
    static const int n[] = { 10000, 100000, 1000000 };
    for (int i = 0; i < (quick ? 1 : 3); i++) {
        char request[128];
        snprintf(request, sizeof request, "chunks abmil %d f32 4096", n[i]);
        measure(r, NULL, 1, max_threads, 0, 1, request);
        if (!r[MIL].ran) { printf("| %d | %s | | |\n", n[i], r[MIL].reason); continue; }
        printf("| %d | %s | %.2f | %.2f |\n", n[i], mebibytes(r[MIL].peak), median(&r[MIL].time), median(&r[MIL].time) / n[i] * 1e6);
        fflush(stdout);
    }
    drop_all();
}

static void section_train(void)
{
    result r[CONTENDERS];
    series fma;
    printf("\n### Training step (forward, backward, AdamW), abmil.base, fp32\n\n"
           "| N | threads | mil.h ms | GFLOP/s | of FMA peak | MiB | over CBLAS | PyTorch |\n|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < bag_count(); i++)
        EVERY_THREADS(t) {
            char request[128];
            snprintf(request, sizeof request, "train abmil %d f32", bag_sizes[i]);
            measure(r, &fma, 7, t, quick ? 1 : 3, 0, request);
            if (!r[MIL].ran) { printf("| %d | %d | %s |\n", bag_sizes[i], t, r[MIL].reason); continue; }
            const double rate = train_flop(bag_sizes[i]) / median(&r[MIL].time) * 1e-9;
            printf("| %d | %d | %s | %.0f | %.0f %% | %s |", bag_sizes[i], t, spread(&r[MIL].time), rate, 100 * rate / limit(&fma), mebibytes(r[MIL].peak));
            print_peer(r, BLAS, 0, 1);
            print_peer(r, TORCH, 0, 1);
            printf("\n");
            fflush(stdout);
            const double stored = median(&r[MIL].time);
            if (t == 1) {                                  // the same step under MIL_TAPE_RECOMPUTE
                result lean[CONTENDERS];
                snprintf(request, sizeof request, "lean abmil %d f32", bag_sizes[i]);
                measure(lean, &fma, 1, t, quick ? 1 : 3, 0, request);
                if (lean[MIL].ran)
                    printf("| %d, constant memory | %d | %s | %.0f | %.0f %% | %s | %.2f times as long as storing | |\n", bag_sizes[i], t, spread(&lean[MIL].time),
                           train_flop(bag_sizes[i]) / median(&lean[MIL].time) * 1e-9, 100 * train_flop(bag_sizes[i]) / median(&lean[MIL].time) * 1e-9 / limit(&fma),
                           mebibytes(lean[MIL].peak), median(&lean[MIL].time) / stored);
                fflush(stdout);
            }
            if (t == 1 && bag_sizes[i] == 10000) {
                add_point("training step", 0, train_flop(10000), 4 * (2 * 10000.0 * D + 4 * 920195.0), median(&r[MIL].time));
                if (r[TORCH].ran) add_point("PyTorch: training step", TORCH, train_flop(10000), 4 * (2 * 10000.0 * D + 4 * 920195.0), median(&r[TORCH].time));
            }
        }
    drop_all();
}

static void section_stream(void)
{
    static char reply[LINE];
    contender *c = &who[MIL];
    printf("\n### Streaming, abmil.base, N = 10,000\n\n| threads | whole bag ms | 256 rows a push ms | share of the whole bag's rate | a push of 256 rows and its logits, ms |\n|---|---|---|---|---|\n");
    EVERY_THREADS(t) {
        result whole, pieces, tail;
        memset(&whole, 0, sizeof whole);
        memset(&pieces, 0, sizeof pieces);
        memset(&tail, 0, sizeof tail);
        c->threads = t;
        if (!ask(c, reply, "threads %d", t) || !ask(c, reply, "load %s", c->reason)) die("%s", reply);
        for (int round = 0; round < (quick ? 3 : 9); round++) {
            if (!ask(c, reply, "score abmil 10000 f32 3")) die("%s", reply);
            read_result(&whole, reply);
            if (!ask(c, reply, "stream abmil 10000 f32 256 3")) die("%s", reply);
            read_result(&pieces, reply);
            if (!ask(c, reply, "tail abmil 10000 f32 256 1")) die("%s", reply);
            read_result(&tail, reply);
        }
        printf("| %d | %s | %s | %.3f | %s |\n", t, spread(&whole.time), spread(&pieces.time), median(&whole.time) / median(&pieces.time), spread(&tail.time));
        fflush(stdout);
    }
    c->loaded = 1;
    drop_all();
}

// From exec to exit.
static double run_cold(char *const *argv)
{
    int status;
    const double begin = now();
    const pid_t pid = spawn(argv, -1, -1, 1);
    waitpid(pid, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? now() - begin : -1;
}

static void section_cold(const char *weights, const char *features)
{
    char program[1200], s_script[1200], mode[] = "--cold", model[] = "abmil", w[1200], f[1200], n[] = "1000", name[32], py[1200];
    series ours, theirs[2];
    snprintf(program, sizeof program, "%s", here);
    snprintf(s_script, sizeof s_script, "%s", script);
    snprintf(w, sizeof w, "%s", weights);
    snprintf(f, sizeof f, "%s", features);
    snprintf(py, sizeof py, "%s", python);
    char *mine[] = { program, mode, model, w, f, n, NULL };
    char *other[] = { py, s_script, name, mode, model, w, f, n, NULL };
    ours.count = theirs[0].count = theirs[1].count = 0;
    for (int round = 0; round < (quick ? 3 : 7); round++) {
        for (int k = 0; k < 5; k++) series_add(&ours, run_cold(mine));
        for (int p = TORCH; p <= ONNX; p++) {
            if (!who[p].alive) continue;
            snprintf(name, sizeof name, "%s", who[p].name);
            const double t = run_cold(other);
            if (t >= 0) series_add(&theirs[p - TORCH], t);
        }
    }
    printf("\n### Cold start: a fresh process loads weights and scores one bag of 1,000 patches, 1 thread\n\n| | ms | times as long |\n|---|---|---|\n| mil.h | %s | |\n", spread(&ours));
    for (int p = TORCH; p <= ONNX; p++) {
        if (theirs[p - TORCH].count) printf("| %s | %s | **%.0f** |\n", who[p].title, spread(&theirs[p - TORCH]), median(&theirs[p - TORCH]) / median(&ours));
        else printf("| %s | %s | |\n", who[p].title, who[p].reason);
    }
    fflush(stdout);
}

// `mil score` on many files, beside reading them alone and computing alone (as much as the scorer does from memory).
static void section_files(const char *weights, const char *features)
{
    static char reply[LINE];
    enum { ROWS = 1000 };
    const int files = quick ? 40 : 1000;
    char tool[1300], w[1200], *argv[1100], pattern[64];
    struct stat there;
    int argc = 0;
    snprintf(tool, sizeof tool, "%s", here);
    snprintf(strrchr(tool, '/') ? strrchr(tool, '/') + 1 : tool, 8, "mil");
    printf("\n### Many bags: mil score on %d files of 1,000 patches, fp32, 1,024 features (%.1f GB)\n\n", files, files * 4.096e-3);
    if (stat(tool, &there)) { printf("not run: no %s (make mil)\n", tool); return; }
    float *x = (float *)need(malloc((size_t)ROWS * D * 4));
    FILE *f = fopen(features, "rb");
    if (!f || fread(x, 4, (size_t)ROWS * D, f) != (size_t)ROWS * D) die("%s", features);
    fclose(f);
    mil_context *ctx;
    if (mil_context_create(&ctx, NULL) != MIL_OK) die("no context");
    snprintf(w, sizeof w, "%s", weights);
    static char words[5][16] = { "score", "--weights", "--model", "abmil" };
    argv[argc++] = tool; argv[argc++] = words[0]; argv[argc++] = words[1]; argv[argc++] = w; argv[argc++] = words[2]; argv[argc++] = words[3];
    const int first = argc;
    for (int i = 0; i < files; i++) {
        snprintf(pattern, sizeof pattern, "%s/bag%04d.npy", folder, i);
        argv[argc++] = strdup(pattern);
        const mil_tensor t = mil_tensor_matrix(x, MIL_F32, ROWS, D);
        if (mil_npy_write(ctx, pattern, &t) != MIL_OK) die("%s", mil_error(ctx));
    }
    argv[argc] = NULL;
    series cold_disk, cached, reading, computing;
    cold_disk.count = cached.count = reading.count = computing.count = 0;
    for (int round = 0; round < 3; round++) {
        for (int from_disk = 1; from_disk >= 0; from_disk--) {
            for (int pass = 0; pass < 1 + from_disk; pass++) {                 // from disk: read alone, and scored
                if (from_disk) {
                    for (int i = first; i < argc; i++) {
                        const int fd = open(argv[i], O_RDONLY);
                        fsync(fd);
                        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
                        close(fd);
                    }
                }
                const double begin = now();
                if (pass == 1)
                    for (int i = first; i < argc; i++) {
                        FILE *bag = fopen(argv[i], "rb");
                        if (!bag || fread(x, 1, (size_t)ROWS * D * 4, bag) == 0) die("%s", argv[i]);
                        fclose(bag);
                    }
                else {
                    int status;
                    waitpid(spawn(argv, -1, -1, 1), &status, 0);
                    if (!WIFEXITED(status) || WEXITSTATUS(status)) { printf("mil score failed\n"); goto done; }
                }
                series_add(pass == 1 ? &reading : from_disk ? &cold_disk : &cached, now() - begin);
            }
        }
        if (!ask(&who[MIL], reply, "threads %d", max_threads) || !ask(&who[MIL], reply, "load %s", who[MIL].reason) || !ask(&who[MIL], reply, "score abmil 1000 f32 20")) die("%s", reply);
        who[MIL].threads = max_threads;
        result r;
        memset(&r, 0, sizeof r);
        read_result(&r, reply);
        series_add(&computing, median(&r.time) * files);
    }
    printf("| | s |\n|---|---|\n| scored from disk | %.2f |\n| scored from the page cache | %.2f |\n| reading alone, from disk | %.2f |\n| computing alone, %d threads | %.2f |\n",
           median(&cold_disk), median(&cached), median(&reading), max_threads, median(&computing));
done:
    for (int i = first; i < argc; i++) { remove(argv[i]); free(argv[i]); }
    free(x);
    mil_context_free(ctx);
    fflush(stdout);
}

static void section_models(const char *features)
{
    static const char *const model[] = { "abmil", "clam", "dsmil", "transmil", "ilra", "transformer", "wikg", "dftd", "rrt" };
    static const int size[] = { 1000, 10000, 50000 };
    result r[CONTENDERS];
    char weights[512];
    const int t = max_threads;
    printf("\n### Every model of MIL-Lab, default options, D = 1024, %d threads (ms; PyTorch: ms, **its time / ours**; MiB beyond the features)\n\n"
           "| model | N | scoring ms | MiB | PyTorch | training step ms | MiB | PyTorch |\n|---|---|---|---|---|---|---|---|\n", t);
    for (int m = 0; m < (int)(sizeof model / sizeof *model); m++) {
        static char reply[LINE];
        drop_all();
        snprintf(weights, sizeof weights, "%s/%s.safetensors", folder, model[m]);
        if (!ask(&who[MIL], reply, "make %s %s %s", model[m], weights, features)) { printf("| %s | | %s |\n", model[m], reply); continue; }
        use_model(model[m], weights, features);
        double last[2][CONTENDERS];
        memset(last, 0, sizeof last);
        for (int i = 0; i < (quick ? 2 : 3); i++) {
            printf("| %s | %d |", model[m], size[i]);
            for (int train = 0; train < 2; train++) {
                char request[128];
                const double grows = i == 0 ? 1 : (double)size[i] / size[i - 1] * (!strcmp(model[m], "transformer") || !strcmp(model[m], "wikg") ? (double)size[i] / size[i - 1] : 1);
                unsigned mask = 5;
                double most = 0;
                for (int p = MIL; p <= TORCH; p += 2) {
                    const double guess = last[train][p] * grows;
                    if (guess > 90) mask &= ~(1u << p);
                    else if (guess > most) most = guess;
                }
                snprintf(request, sizeof request, "%s %s %d f32", train ? "train" : "score", model[m], size[i]);
                measure(r, NULL, mask, t, quick ? 0.3 : 1, most > 4, request);
                for (int p = MIL; p <= TORCH; p += 2) {
                    if (!(mask >> p & 1)) { snprintf(r[p].reason, sizeof r[p].reason, "not run: would take %.0f s", last[train][p] * grows); continue; }
                    if (r[p].ran) last[train][p] = median(&r[p].time);
                }
                if (r[MIL].ran) printf(" %s | %s |", spread(&r[MIL].time), mebibytes(r[MIL].peak));
                else printf(" %s | |", r[MIL].reason);
                if (r[MIL].ran) print_peer(r, TORCH, !train, 1);
                else printf(" |");
                drop_all();
            }
            printf("\n");
            fflush(stdout);
        }
    }
}

// ---- the roofline as SVG -------------------------------------------------------------------------------------------------
static double log_x(double intensity) { return 70 + (log2(intensity) + 2) / 14 * 560; }         // 1/4 .. 4096 FLOP per byte
static double log_y(double rate) { return 340 - (log2(rate) - 1) / 8 * 300; }                     // 2 .. 512 GFLOP/s

static void draw_roofline(double peak, double bandwidth)
{
    char path[512];
    snprintf(path, sizeof path, "%s/roofline.svg", folder);
    FILE *f = fopen(path, "w");
    if (!f) die("%s: %s", path, strerror(errno));
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 660 400\" font-family=\"sans-serif\" font-size=\"11\">\n"
               "<rect width=\"660\" height=\"400\" fill=\"#fff\"/>\n<g stroke=\"#ddd\">\n");
    for (int e = -2; e <= 12; e += 2) fprintf(f, "<path d=\"M%.1f 40V340\"/>\n", log_x(ldexp(1, e)));
    for (int e = 1; e <= 9; e++) fprintf(f, "<path d=\"M70 %.1fH630\"/>\n", log_y(ldexp(1, e)));
    fprintf(f, "</g>\n<g fill=\"#444\">\n");
    for (int e = -2; e <= 12; e += 2) fprintf(f, "<text x=\"%.1f\" y=\"356\" text-anchor=\"middle\">%g</text>\n", log_x(ldexp(1, e)), ldexp(1, e));
    for (int e = 1; e <= 9; e++) fprintf(f, "<text x=\"62\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n", log_y(ldexp(1, e)) + 4, ldexp(1, e));
    fprintf(f, "<text x=\"350\" y=\"380\" text-anchor=\"middle\">FLOP per byte of features, results and weights</text>\n"
               "<text x=\"20\" y=\"190\" text-anchor=\"middle\" transform=\"rotate(-90 20 190)\">GFLOP/s</text>\n"
               "<text x=\"350\" y=\"22\" text-anchor=\"middle\" font-size=\"13\">One thread: %.0f GFLOP/s of fused multiply-adds, %.1f GB/s from memory</text>\n</g>\n", peak, bandwidth);
    const double knee = peak / bandwidth;
    fprintf(f, "<path d=\"M%.1f %.1fL%.1f %.1fH630\" fill=\"none\" stroke=\"#222\" stroke-width=\"2\"/>\n", log_x(2 / bandwidth < 0.25 ? 0.25 : 2 / bandwidth),
            log_y(2 / bandwidth < 0.25 ? 0.25 * bandwidth : 2), log_x(knee), log_y(peak));
    static const char *const colour[CONTENDERS] = { "#0a6", "#888", "#d33", "#36c", "#a80" };
    for (int i = 0; i < point_count; i++) {
        const point *p = &points[i];
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", log_x(p->intensity), log_y(p->rate), colour[p->kind]);
        fprintf(f, "<text x=\"72\" y=\"%d\" fill=\"%s\">%s: %.0f GFLOP/s, %.0f %%</text>\n", 56 + 15 * i, colour[p->kind], p->name, p->rate, 100 * p->rate / peak);
    }
    fprintf(f, "</svg>\n");
    if (fclose(f)) die("%s: %s", path, strerror(errno));
    printf("\nRoofline: %s (1 thread: %.0f GFLOP/s of FMA, %.1f GB/s from memory)\n", path, peak, bandwidth);
}

static void print_machine(void)
{
    char line[4096], model[256] = "unknown CPU";
    FILE *f = fopen("/proc/cpuinfo", "r");
    char features[256] = "";
    static const char *const wanted[] = { "sse2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "asimdhp", "sve", "bf16" };
    while (f && fgets(line, sizeof line, f)) {
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) snprintf(model, sizeof model, "%.200s", strchr(line, ':') + 2);
        if ((!strncmp(line, "flags", 5) || !strncmp(line, "Features", 8)) && !features[0])
            for (char *p = strtok(strchr(line, ':') + 1, " \n"); p; p = strtok(NULL, " \n"))
                for (int i = 0; i < (int)(sizeof wanted / sizeof *wanted); i++)
                    if (!strcmp(p, wanted[i])) { strncat(features, p, sizeof features - strlen(features) - 2); strcat(features, " "); }
    }
    if (f) fclose(f);
    model[strcspn(model, "\n")] = 0;
    printf("# mil.h bench\n\n- machine: %s, %ld CPUs online\n- CPU features: %s\n- compiler: %s\n", model, sysconf(_SC_NPROCESSORS_ONLN), features,
#ifdef __clang__
           "clang " __clang_version__
#elif defined(__GNUC__)
           "gcc " __VERSION__
#else
           "?"
#endif
    );
    double load[1] = { 0 };
    FILE *l = fopen("/proc/loadavg", "r");
    if (l) { if (fscanf(l, "%lf", load) != 1) load[0] = -1; fclose(l); }
    printf("- load when it began: %.2f\n", load[0]);
}

int main(int argc, char **argv)
{
    static series fma;
    char self[1200], blas[1200], serve_text[] = "--serve", py[1200];
    if (argc > 1 && !strcmp(argv[1], "--serve")) return serve();
    if (argc > 5 && !strcmp(argv[1], "--cold")) return cold(argv + 2);
    signal(SIGPIPE, SIG_IGN);
    here = argv[0];
    python = getenv("PYTHON") && *getenv("PYTHON") ? getenv("PYTHON") : "python3";
    script = getenv("BENCH_SCRIPT") ? getenv("BENCH_SCRIPT") : "tools/bench.py";
    quick = getenv("BENCH_QUICK") != NULL;
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    max_threads = getenv("BENCH_THREADS") ? atoi(getenv("BENCH_THREADS")) : cpus >= 2 ? 2 : 1;
    if (max_threads < 1 || max_threads > 64) die("BENCH_THREADS: 1 to 64");
    mkdir("build", 0777);
    if (mkdir(folder, 0777) && errno != EEXIST) die("%s: %s", folder, strerror(errno));
    mil_context *ctx;
    if (mil_context_create(&ctx, NULL) != MIL_OK) die("no context");
    snprintf(cpu_kernels, sizeof cpu_kernels, "%s", mil_context_cpu(ctx));
    mil_context_free(ctx);

    // An OpenBLAS that does not know this CPU falls back to kernels of long ago: it is told what the CPU can do.
    if (!getenv("OPENBLAS_CORETYPE") && cpu_kernels[0] == 'a') setenv("OPENBLAS_CORETYPE", !strcmp(cpu_kernels, "avx512") ? "SkylakeX" : "Haswell", 1);
    snprintf(self, sizeof self, "%s", argv[0]);
    snprintf(blas, sizeof blas, "%s_cblas", argv[0]);
    snprintf(py, sizeof py, "%s", python);
    char *mine[] = { self, serve_text, NULL }, *over[] = { blas, serve_text, NULL };
    name_contenders();
    start(&who[MIL], mine);
    if (!who[MIL].alive) die("cannot start %s", self);
    start(&who[BLAS], over);
    if (!who[BLAS].alive) snprintf(who[BLAS].reason, sizeof who[BLAS].reason, "not installed");
    for (int p = TORCH; p < CONTENDERS; p++) {
        char name[32], path[1200];
        snprintf(name, sizeof name, "%s", who[p].name);
        snprintf(path, sizeof path, "%s", script);
        char *other[] = { py, path, name, NULL };
        start(&who[p], other);
    }
    print_machine();
    for (int p = 0; p < CONTENDERS; p++) printf("- %s: %s\n", who[p].title, who[p].alive ? who[p].version : who[p].reason);
    fma.count = 0;
    for (int i = 0; i < 15; i++) series_add(&fma, fma_peak(1));
    const double peak = median(&fma), bandwidth = read_rate(1);
    printf("- FMA peak: %.0f GFLOP/s on one thread (%.0f..%.0f)", peak, series_at(&fma, 0), series_at(&fma, 1));
    fma.count = 0;
    for (int i = 0; i < 15; i++) series_add(&fma, fma_peak(max_threads));
    printf(", %.0f on %d (%.0f..%.0f); each line below measures its own in the same turns\n- threads: 1 and %d\n", median(&fma), max_threads, series_at(&fma, 0), series_at(&fma, 1), max_threads);
    printf("- times: median (smallest..largest); on one thread CPU time of the process (wall time on an idle machine), else wall time\n");
    fflush(stdout);

    // Features for everybody.
    char features[512], weights[512];
    snprintf(features, sizeof features, "%s/features.f32", folder);
    snprintf(weights, sizeof weights, "%s/abmil.safetensors", folder);
    {
        const int rows = quick ? 10000 : 100000, block = 1000;
        float *x = (float *)need(malloc((size_t)block * D * 4));
        FILE *f = fopen(features, "wb");
        if (!f) die("%s: %s", features, strerror(errno));
        for (int i = 0; i < rows; i += block) {
            fill(x, (int64_t)block * D, (uint64_t)i + 7);
            if (fwrite(x, 4, (size_t)block * D, f) != (size_t)block * D) die("%s: %s", features, strerror(errno));
        }
        if (fclose(f)) die("%s: %s", features, strerror(errno));
        free(x);
    }
    unsigned sections = 0;
    static const char *const names[] = { "gemm", "score", "memory", "train", "stream", "cold", "files", "models", "bf16" };
    for (int i = 0; i < 9; i++)
        for (int a = 1; a < argc; a++) if (!strcmp(argv[a], names[i])) sections |= 1u << i;
    if (argc < 2) sections = 511;
    if (sections & 1) section_gemm();
    use_model("abmil", weights, features);
    if (sections & 2) section_score();
    if (sections & 256) section_bf16();
    if (sections & 4) section_memory();
    if (sections & 8) section_train();
    if (sections & 16) section_stream();
    if (sections & 32) section_cold(weights, features);
    if (point_count) draw_roofline(peak, bandwidth);
    if (sections & 64) section_files(weights, features);
    if (sections & 128) section_models(features);
    for (int p = 0; p < CONTENDERS; p++) stop(&who[p]);
    remove(features);
    return 0;
}
