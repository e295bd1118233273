// build: float double
// The scorer: streams of patches in any pieces and on any threads give the bits of a whole bag, bad rows change nothing, memory is
// what was announced, and what a model means holds: permuted, doubled, masked patches.
#include "mil.h"
#include "check.h"
#include "memory.h"
#include <float.h>

enum { D = 24, C = 3, N = 1200 };                          // several tiles of 128, and a rest
#define NAME "abmil.base.uni.none"
#define OPTIONS "in_dim=24 embed_dim=20 attn_dim=12 num_classes=3 dropout=0"
#define EVERYTHING ((1u << MIL_RESULT_COUNT) - 1)
#define ROUNDING (MIL_REAL_IS_FLOAT ? 1e-5 : 1e-13)        // sums of a thousand terms in another order

typedef struct answers { mil_real logits[C], probabilities[C], attention[N + 400], weights[N + 400], contribution[(N + 400) * C], slide[20]; int64_t n; } answers;

static mil_real bag[(N + 400) * D];
static answers whole, now;                                 // large: not on the stack

static mil_context *ctx;
static mil_model *model;
static memory mem;

static void fill_bag(void)
{
    uint64_t state = 7;
    for (int i = 0; i < (N + 400) * D; i++) bag[i] = (mil_real)memory_noise(&state);
}

static void begin(int threads, long *hosted)
{
    fill_bag();
    ctx = memory_context(&mem, threads, hosted);
    model = mil_create(ctx, NAME, OPTIONS);
    CHECK(model != NULL);
    uint64_t state = 3;                                    // noise everywhere: fresh biases are zero
    for (int64_t i = 0; i < mil_model_param_count(model); i++) {
        mil_param *p = mil_model_param(model, i);
        for (int64_t k = 0; k < p->count; k++) ((mil_real *)p->data)[k] += (mil_real)(0.5 * memory_noise(&state));
        p->version++;
    }
}

static void end(void)
{
    mil_model_free(model);
    mil_context_free(ctx);
    CHECK(mem.bytes == 0);
}

static mil_scorer *make_scorer(int64_t capacity)
{
    mil_scorer_options o = mil_scorer_options_default();
    o.capacity = capacity;
    o.results = EVERYTHING;
    mil_scorer *s = mil_scorer_create(model, &o);
    if (!CHECK(s != NULL)) puts(mil_error(ctx));
    return s;
}

static void read_all(mil_scorer *s, answers *a)
{
    memset(a, 0, sizeof *a);
    a->n = mil_scorer_count(s, MIL_ATTENTION);
    CHECK(mil_scorer_read(s, MIL_LOGITS, a->logits, C) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_PROBABILITIES, a->probabilities, C) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_ATTENTION, a->attention, a->n) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_WEIGHTS, a->weights, a->n) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_CONTRIBUTION, a->contribution, a->n * C) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_SLIDE_FEATS, a->slide, 20) == MIL_OK);
}

static mil_bag bag_of(const mil_real *rows, int64_t n)
{
    mil_bag b;
    memset(&b, 0, sizeof b);
    b.features = mil_tensor_matrix(rows, MIL_REAL_DTYPE, n, D);
    return b;
}

static void score_whole(int64_t n, answers *a)
{
    const mil_bag b = bag_of(bag, n);
    mil_scorer *s = make_scorer(0);
    CHECK(mil_scorer_score(s, &b) == MIL_OK);
    read_all(s, a);
    CHECK(a->n == n);
    mil_scorer_free(s);
}

static int same_bits(const answers *a, const answers *b) { return memcmp(a, b, sizeof *a) == 0; }

// The same bag through the tape, without streams, tiles or packed weights.
static void score_recorded(const mil_bag *b, answers *a)
{
    mil_tape *tape = NULL;
    mil_outputs out;
    memset(a, 0, sizeof *a);
    a->n = b->features.shape[b->features.rank - 2];
    CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
    mil_tape_set(tape, MIL_TAPE_NO_GROUPS, 1);
    mil_tape_set(tape, MIL_TAPE_NO_REUSE, 1);
    CHECK(mil_model_record(tape, model, b, NULL, &out) == MIL_OK);
    mil_node_keep(out.logits);
    mil_node_keep(out.attention_scores);
    mil_node_keep(out.attention_weights);
    mil_node_keep(out.contribution);
    mil_node_keep(out.slide_feats);
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK(mil_node_read(out.logits, a->logits, C) == MIL_OK);
    CHECK(mil_node_read(out.attention_scores, a->attention, a->n) == MIL_OK);
    CHECK(mil_node_read(out.attention_weights, a->weights, a->n) == MIL_OK);
    CHECK(mil_node_read(out.contribution, a->contribution, a->n * C) == MIL_OK);
    CHECK(mil_node_read(out.slide_feats, a->slide, 20) == MIL_OK);
    mil_tape_free(tape);
}

// ---- pieces, threads ----
TEST(whole_bag_agrees_with_the_recorded_model)
{
    begin(1, NULL);
    const mil_bag b = bag_of(bag, N);
    score_whole(N, &whole);
    score_recorded(&b, &now);
    for (int c = 0; c < C; c++) CHECK_NEAR(whole.logits[c], now.logits[c], ROUNDING);
    for (int n = 0; n < N; n++) CHECK_NEAR(whole.attention[n], now.attention[n], ROUNDING);
    for (int n = 0; n < N; n++) CHECK_NEAR(whole.weights[n], now.weights[n], ROUNDING);
    for (int n = 0; n < N * C; n++) CHECK_NEAR(whole.contribution[n], now.contribution[n], ROUNDING);
    for (int e = 0; e < 20; e++) CHECK_NEAR(whole.slide[e], now.slide[e], ROUNDING);
    double sum = 0;
    for (int c = 0; c < C; c++) sum += (double)whole.probabilities[c];
    CHECK_NEAR(sum, 1, 1e-6);
    end();
}

TEST(pushes_of_any_size_give_the_bits_of_the_whole_bag)
{
    static const int sizes[] = { 1, 7, 127, 128, 129, 256, 1000, 0 };          // 0: random pieces
    begin(1, NULL);
    score_whole(N, &whole);
    for (int k = 0; k < 8; k++) {
        uint64_t state = 11;
        mil_scorer *s = make_scorer(0);
        for (int64_t at = 0; at < N; ) {
            int64_t n = sizes[k] ? sizes[k] : (int64_t)(150 * (1 + memory_noise(&state)));
            if (n > N - at) n = N - at;
            CHECK(mil_scorer_push(s, bag + at * D, n, 0, MIL_REAL_DTYPE) == MIL_OK);
            at += n;
            CHECK(mil_scorer_instances(s) == at);
        }
        read_all(s, &now);
        CHECK(same_bits(&whole, &now));
        mil_scorer_free(s);
    }
    end();
}

TEST(any_number_of_threads_gives_the_same_bits)
{
    static const int threads[] = { 2, 3, 5, 8 };
    begin(1, NULL);
    score_whole(N, &whole);
    end();
    for (int k = 0; k < 4; k++)
        for (int host = 0; host < 2; host++) {
            long loops = 0;
            begin(threads[k], host ? &loops : NULL);
            score_whole(N, &now);
            CHECK(same_bits(&whole, &now));
            mil_scorer *s = make_scorer(0);
            for (int64_t at = 0; at < N; at += 300) CHECK(mil_scorer_push(s, bag + at * D, 300, 0, MIL_REAL_DTYPE) == MIL_OK);
            read_all(s, &now);
            CHECK(same_bits(&whole, &now));
            mil_scorer_free(s);
            CHECK(!host || loops > 0);
            end();
        }
}

// Features and weights rounded to 8 bits of precision: each product is off by 2^-8 at most, in sums of 24 and 20 of them.
TEST(bfloat_products_are_near_and_keep_their_bits_in_any_pieces)
{
    begin(1, NULL);
    score_whole(N, &whole);
    mil_tape *tape = NULL;
    const mil_bag b = bag_of(bag, N);
    end();
    for (int threads = 1; threads < 4; threads++) {
        static answers first;
        mil_context_options o = mil_context_options_default();
        o.precision = MIL_PRECISION_BF16;
        o.threads = threads;
        begin(1, NULL);                                    // the same weights, in a context of that precision
        mil_context *full = ctx;
        mil_model *exact = model;
        CHECK(mil_context_create(&ctx, &o) == MIL_OK);
        model = mil_create(ctx, NAME, OPTIONS);
        for (int64_t i = 0; i < mil_model_param_count(model); i++)
            CHECK(mil_param_write(mil_model_param(model, i), (const mil_real *)mil_model_param(exact, i)->data, mil_model_param(exact, i)->count) == MIL_OK);
        score_whole(N, &now);
        if (mil_context_precision(ctx) == MIL_PRECISION_FULL) CHECK(same_bits(&now, &whole));
        else {
            CHECK(MIL_REAL_IS_FLOAT && !same_bits(&now, &whole));
            for (int c = 0; c < C; c++) CHECK_NEAR(now.logits[c], whole.logits[c], 2e-2);
            for (int n = 0; n < N; n++) CHECK_NEAR(now.attention[n], whole.attention[n], 4e-2);
        }
        if (threads == 1) first = now;
        CHECK(same_bits(&now, &first));
        mil_scorer *s = make_scorer(0);
        for (int64_t at = 0, n = 7; at < N; at += n, n = N - at < 130 ? N - at : 130) CHECK(mil_scorer_push(s, bag + at * D, n, 0, MIL_REAL_DTYPE) == MIL_OK);
        read_all(s, &now);
        CHECK(same_bits(&now, &first));
        mil_scorer_free(s);
        for (int training = 0; training < 2; training++) { // a training tape multiplies in full
            mil_outputs out;
            mil_real logits[C];
            CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
            mil_tape_training(tape, training);
            CHECK(mil_model_record(tape, model, &b, NULL, &out) == MIL_OK);
            mil_node_keep(out.logits);
            CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(out.logits, logits, C) == MIL_OK);
            for (int c = 0; c < C && training; c++) CHECK_NEAR(logits[c], whole.logits[c], ROUNDING);
            for (int c = 0; c < C && !training; c++) CHECK_NEAR(logits[c], first.logits[c], ROUNDING);
            mil_tape_free(tape);
        }
        mil_model_free(model);
        mil_context_free(ctx);
        ctx = full;
        model = exact;
        end();
    }
    mil_context_options o = mil_context_options_default();
    memset(&o.precision, 77, sizeof o.precision);
    CHECK(mil_context_create(&ctx, &o) == MIL_ERROR_ARGUMENT);
}

TEST(results_so_far_are_those_of_a_bag_that_ends_there_and_change_nothing)
{
    begin(1, NULL);
    mil_scorer *s = make_scorer(0);
    for (int64_t at = 0; at < N; ) {
        const int64_t n = at < 300 ? 75 : 225;
        CHECK(mil_scorer_push(s, bag + at * D, n, 0, MIL_REAL_DTYPE) == MIL_OK);
        at += n;
        read_all(s, &now);
        score_whole(at, &whole);
        CHECK(same_bits(&whole, &now));
        read_all(s, &now);                                 // asking twice is asking once
        CHECK(same_bits(&whole, &now));
    }
    mil_scorer_free(s);
    end();
}

TEST(a_scorer_is_used_again_after_reset)
{
    begin(1, NULL);
    score_whole(200, &whole);
    mil_scorer *s = make_scorer(0);
    for (int k = 0; k < 3; k++) {
        CHECK(mil_scorer_push(s, bag + 5 * D, 700 + k, 0, MIL_REAL_DTYPE) == MIL_OK);
        if (k) read_all(s, &now);
        mil_scorer_reset(s);
        CHECK(mil_scorer_instances(s) == 0);
        CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_ERROR_STATE);
        CHECK(mil_scorer_push(s, bag, 200, 0, MIL_REAL_DTYPE) == MIL_OK);
        read_all(s, &now);
        CHECK(same_bits(&whole, &now));
        mil_scorer_reset(s);
    }
    mil_scorer_free(s);
    end();
}

TEST(a_masked_bag_between_streams_leaves_no_trace)
{
    begin(1, NULL);
    score_whole(200, &whole);
    unsigned char mask[200];
    memset(mask, 1, sizeof mask);
    mil_bag b = bag_of(bag, 200);
    b.mask = mil_tensor_matrix(mask, MIL_U8, 1, 200);
    b.mask.rank = 1;
    b.mask.shape[0] = 200;
    mil_scorer *s = make_scorer(0);
    CHECK(mil_scorer_push(s, bag + 9 * D, 100, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mil_scorer_score(s, &b) == MIL_OK);
    CHECK(mil_scorer_instances(s) == 200);
    read_all(s, &now);
    for (int c = 0; c < C; c++) CHECK_NEAR(now.logits[c], whole.logits[c], ROUNDING);
    CHECK(mil_scorer_push(s, bag, 200, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mil_scorer_instances(s) == 200);
    read_all(s, &now);
    CHECK(same_bits(&whole, &now));
    mil_scorer_free(s);
    end();
}

// ---- rows of every kind ----
static uint16_t to_half(float x)                           // exact for the multiples of 1/8 below 16 that are used here
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) == 0) return (uint16_t)(u >> 16);
    return (uint16_t)((u >> 16 & 0x8000u) | (((u >> 23 & 255u) - 112u) << 10) | (u >> 13 & 1023u));
}

TEST(rows_of_any_type_stride_and_alignment)
{
    static const mil_dtype dtypes[] = { MIL_F32, MIL_F64, MIL_F16, MIL_BF16, MIL_I8, MIL_U8, MIL_I16, MIL_U16, MIL_I32, MIL_U32, MIL_I64, MIL_U64 };
    enum { M = 300, STEP = D * 8 + 12 };
    static char room[M * STEP + 16];
    const uint16_t one = 1;
    const int little = *(const unsigned char *)&one == 1;   // the byte order of this machine
    begin(1, NULL);
    for (int k = 0; k < 12; k++) {
        const mil_dtype dtype = dtypes[k];
        const size_t width = mil_dtype_size(dtype);
        const int whole_numbers = k >= 4, no_sign = dtype == MIL_U8 || dtype == MIL_U16 || dtype == MIL_U32 || dtype == MIL_U64;
        for (int form = 0; form < 3; form++) {             // packed; strided; strided and at an odd address
            const size_t step = form ? (size_t)STEP : D * width;
            char *rows = room + (form == 2 ? 1 : 0);
            uint64_t state = 5;
            for (int r = 0; r < M; r++)
                for (int c = 0; c < D; c++) {
                    double v = floor(8 * memory_noise(&state)) / (whole_numbers ? 1 : 8);
                    if (no_sign) v = fabs(v);
                    const float f = (float)v;
                    const int64_t i = (int64_t)v;
                    uint32_t u;
                    memcpy(&u, &f, sizeof u);
                    const uint16_t half = to_half(f), brain = (uint16_t)(u >> 16);
                    char *to = rows + (size_t)r * step + (size_t)c * width;
                    if (dtype == MIL_F32) memcpy(to, &f, 4);
                    else if (dtype == MIL_F64) memcpy(to, &v, 8);
                    else if (dtype == MIL_F16) memcpy(to, &half, 2);
                    else if (dtype == MIL_BF16) memcpy(to, &brain, 2);
                    else for (size_t b = 0; b < width; b++) to[little ? b : width - 1 - b] = (char)((uint64_t)i >> (8 * b) & 255);
                    bag[r * D + c] = (mil_real)v;
                }
            score_whole(M, &whole);
            mil_scorer *s = make_scorer(0);
            CHECK(mil_scorer_push(s, rows, 150, form ? step : 0, dtype) == MIL_OK);
            CHECK(mil_scorer_push(s, rows + 150 * step, M - 150, form ? step : 0, dtype) == MIL_OK);
            read_all(s, &now);
            if (!CHECK(same_bits(&whole, &now))) printf("%s, form %d\n", mil_dtype_name(dtype), form);
            mil_bag b;
            memset(&b, 0, sizeof b);
            b.features = mil_tensor_matrix(rows, dtype, M, D);
            if (form) b.features.stride[0] = STEP, b.features.stride[1] = (int64_t)width;
            CHECK(mil_scorer_score(s, &b) == MIL_OK);
            read_all(s, &now);
            if (!CHECK(same_bits(&whole, &now))) printf("%s, form %d, as a bag\n", mil_dtype_name(dtype), form);
            mil_scorer_free(s);
        }
    }
    end();
}

// ---- what is refused ----
TEST(rows_that_are_not_finite_are_refused_and_the_bag_is_as_before)
{
    static mil_real bad[700 * D];
    static const int place[] = { 0, 5, 127, 128, 300, 640, 699 };
    static const int before[] = { 0, 1, 100, 128, 256, 300 };
    begin(1, NULL);
    for (int b = 0; b < 6; b++) {
        score_whole(before[b] + 50, &whole);
        for (int p = 0; p < 7; p++)
            for (int form = 0; form < 3; form++) {         // NaN; infinity; a row stride, so that rows go through the stage
                mil_scorer *s = make_scorer(0);
                CHECK(mil_scorer_push(s, bag, before[b], 0, MIL_REAL_DTYPE) == MIL_OK);
                memcpy(bad, bag, sizeof bad);
                bad[place[p] * D + 17] = (mil_real)(form == 1 ? (double)INFINITY : (double)NAN);
                if (form < 2) CHECK(mil_scorer_push(s, bad, 700, 0, MIL_REAL_DTYPE) == MIL_ERROR_NUMERIC);
                else {
                    for (int r = 349; r >= 0; r--) memmove(bad + 2 * r * D, bad + r * D, D * sizeof(mil_real));
                    bad[2 * (place[p] / 2) * D + 3] = (mil_real)-(double)INFINITY;
                    CHECK(mil_scorer_push(s, bad, 350, 2 * D * sizeof(mil_real), MIL_REAL_DTYPE) == MIL_ERROR_NUMERIC);
                }
                char part[32];
                snprintf(part, sizeof part, "row %d ", form < 2 ? place[p] : place[p] / 2);
                CHECK_CONTAINS(mil_error(ctx), part);
                CHECK(mil_scorer_instances(s) == before[b]);
                CHECK(mil_scorer_push(s, bag + before[b] * D, 50, 0, MIL_REAL_DTYPE) == MIL_OK);
                read_all(s, &now);
                CHECK(same_bits(&whole, &now));
                mil_scorer_free(s);
            }
    }
    end();
}

TEST(of_several_rows_that_are_not_finite_the_first_is_named)
{
    static const int places[3][2] = { { 0, 200 }, { 130, 650 }, { 0, 128 } };
    begin(1, NULL);
    for (int k = 0; k < 3; k++) {
        mil_scorer *s = make_scorer(0);
        char part[32];
        for (int i = 0; i < 2; i++) bag[places[k][i] * D + 5] = (mil_real)NAN;
        CHECK(mil_scorer_push(s, bag, 700, 0, MIL_REAL_DTYPE) == MIL_ERROR_NUMERIC);
        snprintf(part, sizeof part, "row %d ", places[k][0]);
        CHECK_CONTAINS(mil_error(ctx), part);
        fill_bag();
        mil_scorer_free(s);
    }
    end();
}

TEST(ranks_under_a_mask_are_each_columns_own)
{
    enum { M = 9, K = 2 };
    static const unsigned char mask[M] = { 0, 1, 1, 0, 1, 1, 0, 0, 1 };
    const int64_t shape = M;
    begin(1, NULL);
    mil_scorer_options o = mil_scorer_options_default();
    mil_model *dsmil = mil_create(ctx, "dsmil", "in_dim=24 embed_dim=8 attn_dim=4 num_classes=2");
    o.results = 1u << MIL_RANK | 1u << MIL_ATTENTION;
    mil_scorer *s = mil_scorer_create(dsmil, &o);
    mil_bag b = bag_of(bag, M);
    mil_real score[M * K], rank[M * K];
    b.mask = mil_tensor_make(mask, MIL_U8, 1, &shape);
    CHECK(mil_scorer_score(s, &b) == MIL_OK && mil_scorer_read(s, MIL_ATTENTION, score, M * K) == MIL_OK && mil_scorer_read(s, MIL_RANK, rank, M * K) == MIL_OK);
    for (int n = 0; n < M; n++)
        for (int k = 0; k < K; k++) {
            int below = 0;
            for (int i = 0; i < M; i++) below += mask[i] && score[i * K + k] < score[n * K + k];
            CHECK_NEAR(rank[n * K + k], mask[n] ? below / 4.0 : 0, 1e-6);          // five are real
        }
    mil_scorer_free(s);
    mil_model_free(dsmil);
    end();
}

TEST(arguments_that_make_no_sense_are_refused)
{
    begin(1, NULL);
    mil_scorer *s = make_scorer(0);
    CHECK(mil_scorer_push(s, NULL, 1, 0, MIL_F32) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "rows is NULL");
    CHECK(mil_scorer_push(s, bag, -1, 0, MIL_F32) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "count is -1");
    CHECK(mil_scorer_push(s, bag, 1, 7, MIL_F32) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "stride 7 is below the 96 bytes of a row");
    CHECK(mil_scorer_push(s, bag, 1, 0, (mil_dtype)99) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "99 is no dtype");
    CHECK(mil_scorer_push(NULL, bag, 1, 0, MIL_F32) == MIL_ERROR_ARGUMENT);
    CHECK(mil_scorer_push(s, NULL, 0, 0, MIL_F32) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_ERROR_STATE);
    CHECK(mil_scorer_score(s, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_scorer_push(s, bag, 4, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C - 1) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "logits has 3 elements, not 2");
    CHECK(mil_scorer_read(s, (mil_result)77, now.logits, 1) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "77 is no result");
    CHECK(mil_scorer_read(s, MIL_LOGITS, NULL, C) == MIL_ERROR_ARGUMENT);
    CHECK(mil_scorer_count(s, (mil_result)-1) == 0);
    mil_bag b = bag_of(bag, 4);
    b.features.shape[1] = D - 1;
    CHECK(mil_scorer_score(s, &b) == MIL_ERROR_ARGUMENT || mil_error_status(ctx) == MIL_ERROR_SHAPE);
    CHECK(mil_error(ctx)[0] != 0);
    CHECK(mil_scorer_push(s, bag, 4, 0, MIL_REAL_DTYPE) == MIL_OK);
    mil_scorer_free(s);
    mil_scorer_options o = mil_scorer_options_default();
    o.capacity = -1;
    CHECK(mil_scorer_create(model, &o) == NULL);
    CHECK_CONTAINS(mil_error(ctx), "options.capacity is -1, not in 0..");
    CHECK(mil_scorer_bytes(model, &o, 10) == 0);
    o.capacity = 0;
    mil_error_clear(ctx);
    CHECK(mil_scorer_bytes(NULL, &o, 10) == 0);
    CHECK(mil_scorer_bytes(model, &o, -3) == 0 && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "mil_scorer_bytes: instances is -3, not in 1..");
    o.results = 1u << 20;
    CHECK(mil_scorer_create(model, &o) == NULL);
    CHECK_CONTAINS(mil_error(ctx), "options.results is 0x100000");
    CHECK(mil_scorer_create(NULL, NULL) == NULL);
    CHECK_CONTAINS(mil_error(ctx), "options.results is 0x100000");             // a missing model keeps the sentence
    mil_scorer_free(NULL);
    mil_scorer_reset(NULL);
    end();
}

TEST(a_result_that_was_not_asked_for_is_told_from_one_that_does_not_exist)
{
    begin(1, NULL);
    mil_scorer *s = mil_scorer_create(model, NULL);        // attention alone
    CHECK(mil_scorer_count(s, MIL_LOGITS) == 0);           // no instance yet
    CHECK(mil_scorer_count(s, MIL_ATTENTION) == 0);
    CHECK(mil_scorer_push(s, bag, 40, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mil_scorer_count(s, MIL_LOGITS) == C);
    CHECK(mil_scorer_count(s, MIL_WEIGHTS) == 0);
    CHECK(mil_scorer_read(s, MIL_WEIGHTS, now.weights, 40) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(ctx), "weights was not asked for");
    CHECK(mil_scorer_read(s, MIL_RANK, now.weights, 40) == MIL_ERROR_STATE);
    mil_scorer_free(s);
    end();
}

// ---- from bag to bag ----
TEST(a_scorer_follows_the_weights)
{
    begin(2, NULL);
    mil_bag b = bag_of(bag, 400);
    mil_scorer *s = make_scorer(0);
    for (int round = 0; round < 3; round++) {
        CHECK(mil_scorer_score(s, &b) == MIL_OK);          // validating between epochs with one scorer
        read_all(s, &now);
        score_whole(400, &whole);
        CHECK(same_bits(&whole, &now));
        CHECK(mil_model_init(model, (uint64_t)round + 9) == MIL_OK);
        read_all(s, &now);                                 // results that were there are still those of the old weights
        CHECK(same_bits(&whole, &now));
    }
    mil_scorer_reset(s);
    CHECK(mil_scorer_push(s, bag, 300, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mil_model_init(model, 77) == MIL_OK);
    CHECK(mil_scorer_push(s, bag, 100, 0, MIL_REAL_DTYPE) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(ctx), "weights changed");
    CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_ERROR_STATE);
    CHECK(mil_scorer_instances(s) == 300);
    mil_scorer_reset(s);
    CHECK(mil_scorer_push(s, bag, 400, 0, MIL_REAL_DTYPE) == MIL_OK);
    read_all(s, &now);
    score_whole(400, &whole);
    CHECK(same_bits(&whole, &now));
    mil_scorer_free(s);
    end();
}

TEST(a_push_after_a_whole_bag_begins_another)
{
    begin(1, NULL);
    const mil_bag b = bag_of(bag + 3 * D, 500);
    mil_scorer *s = make_scorer(0);
    CHECK(mil_scorer_score(s, &b) == MIL_OK);
    CHECK(mil_scorer_push(s, bag, 150, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mil_scorer_push(s, bag + 150 * D, 50, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mil_scorer_instances(s) == 200);
    read_all(s, &now);
    score_whole(200, &whole);
    CHECK(same_bits(&whole, &now));
    mil_scorer_free(s);
    end();
}

TEST(a_batch_gives_its_bags_results_one_after_the_other)
{
    begin(1, NULL);
    enum { M = 90 };
    mil_bag b = bag_of(bag, 2 * M);
    b.features.rank = 3;
    b.features.shape[0] = 2;
    b.features.shape[1] = M;
    b.features.shape[2] = D;
    mil_scorer *s = make_scorer(0);
    mil_real logits[2 * C], rank[2 * M], one[M];
    CHECK(mil_scorer_score(s, &b) == MIL_OK);
    CHECK(mil_scorer_instances(s) == M);
    CHECK(mil_scorer_count(s, MIL_LOGITS) == 2 * C && mil_scorer_count(s, MIL_RANK) == 2 * M);
    CHECK(mil_scorer_read(s, MIL_LOGITS, logits, 2 * C) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_RANK, rank, 2 * M) == MIL_OK);
    for (int k = 0; k < 2; k++) {
        b = bag_of(bag + k * M * D, M);
        CHECK(mil_scorer_score(s, &b) == MIL_OK);
        CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_OK);
        CHECK(mil_scorer_read(s, MIL_RANK, one, M) == MIL_OK);
        for (int c = 0; c < C; c++) CHECK_NEAR(logits[k * C + c], now.logits[c], ROUNDING);
        for (int n = 0; n < M; n++) CHECK_NEAR(rank[k * M + n], one[n], ROUNDING);
    }
    mil_scorer_free(s);
    end();
}

// ---- rows that are not finite, in bags that are scored whole ----
static mil_real not_finite(int k) { return (mil_real)(k == 0 ? (double)NAN : k == 1 ? (double)INFINITY : -(double)INFINITY); }

// The bag is refused, its row is named, and the results of the bag before are not taken for its own.
static void check_row_refused(mil_scorer *s, const mil_bag *b, int row)
{
    char part[64];
    mil_real logits[2 * C];
    snprintf(part, sizeof part, "row %d of the features holds NaN or infinity", row);
    CHECK(mil_scorer_score(s, b) == MIL_ERROR_NUMERIC);
    CHECK_CONTAINS(mil_error(ctx), part);
    CHECK(mil_scorer_count(s, MIL_LOGITS) == 0);
    CHECK(mil_scorer_read(s, MIL_LOGITS, logits, C) == MIL_ERROR_STATE);
}

TEST(a_model_that_needs_all_rows_refuses_one_that_is_not_finite)
{
    enum { M = 9, WIDE = 70 };                             // more columns than are looked at in one go
    static const int column[] = { 0, 63, 64, 69 };
    static mil_real x[2 * M * WIDE];
    begin(1, NULL);
    mil_model *other = mil_create(ctx, "transmil", "in_dim=70 embed_dim=8 num_classes=3");
    mil_scorer *s = mil_scorer_create(other, NULL);
    mil_real first[C], logits[C];
    const int64_t one[2] = { M, WIDE }, two[3] = { 2, M, WIDE };
    mil_bag b;
    if (!CHECK(s != NULL)) return;
    memset(&b, 0, sizeof b);
    memcpy(x, bag, sizeof x);
    b.features = mil_tensor_make(x, MIL_REAL_DTYPE, 2, one);
    CHECK(mil_scorer_score(s, &b) == MIL_OK && mil_scorer_read(s, MIL_LOGITS, first, C) == MIL_OK);
    for (int k = 0; k < 4; k++)
        for (int row = 0; row < M; row += 4) {
            x[row * WIDE + column[k]] = not_finite(k % 3);
            check_row_refused(s, &b, row);
            x[row * WIDE + column[k]] = bag[row * WIDE + column[k]];
        }
    b.features = mil_tensor_make(x, MIL_REAL_DTYPE, 3, two);                   // of a batch: rows count over all bags
    x[(M + 2) * WIDE + 5] = not_finite(0);
    check_row_refused(s, &b, M + 2);
    b.features = mil_tensor_make(x, MIL_REAL_DTYPE, 2, one);                   // the first bag alone is still fine
    CHECK(mil_scorer_score(s, &b) == MIL_OK && mil_scorer_read(s, MIL_LOGITS, logits, C) == MIL_OK);
    CHECK(memcmp(first, logits, sizeof first) == 0);
    mil_scorer_free(s);
    mil_model_free(other);
    end();
}

TEST(a_batch_of_a_model_that_streams_refuses_a_row_that_is_not_finite)
{
    enum { M = 9 };
    const int64_t two[3] = { 2, M, D };
    begin(1, NULL);
    mil_scorer *s = make_scorer(0);
    mil_bag b = bag_of(bag, 2 * M);
    b.features = mil_tensor_make(bag, MIL_REAL_DTYPE, 3, two);
    for (int k = 0; k < 3; k++) {
        const mil_real was = bag[(M + k) * D + 23];
        CHECK(mil_scorer_score(s, &b) == MIL_OK);
        bag[(M + k) * D + 23] = not_finite(k);
        check_row_refused(s, &b, M + k);
        bag[(M + k) * D + 23] = was;
    }
    mil_scorer_free(s);
    end();
}

// The halves of a bag, and columns that stand apart: what lies between them is not looked at.
TEST(halves_and_columns_apart_are_looked_at_where_they_are)
{
    enum { M = 9 };
    static const uint16_t bad_half[] = { 0x7e00, 0x7c00, 0xfc00 };             // NaN, infinity, -infinity
    static uint16_t half[M * D];
    static mil_real apart[2 * M * D];
    begin(1, NULL);
    mil_model *other = mil_create(ctx, "transmil", "in_dim=24 embed_dim=8 num_classes=3");
    mil_scorer *streams = make_scorer(0), *needs_all = mil_scorer_create(other, NULL);
    if (!CHECK(streams && needs_all)) return;
    for (int i = 0; i < M * D; i++) {
        half[i] = to_half((float)(i % 16) / 8);
        apart[2 * i] = bag[i];
        apart[2 * i + 1] = not_finite(i % 3);
    }
    mil_bag halves = bag_of(bag, M), columns = bag_of(bag, M);
    halves.features = mil_tensor_matrix(half, MIL_F16, M, D);
    columns.features.data = apart;
    columns.features.stride[0] = 2 * D * (int64_t)sizeof *apart;
    columns.features.stride[1] = 2 * (int64_t)sizeof *apart;
    CHECK(mil_scorer_score(needs_all, &halves) == MIL_OK);
    CHECK(mil_scorer_score(needs_all, &columns) == MIL_OK);
    CHECK(mil_scorer_score(streams, &columns) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        const uint16_t was = half[(k + 4) * D + 7];
        half[(k + 4) * D + 7] = bad_half[k];
        check_row_refused(needs_all, &halves, k + 4);
        half[(k + 4) * D + 7] = was;
        apart[2 * ((k + 2) * D + 23)] = not_finite(k);
        check_row_refused(needs_all, &columns, k + 2);
        check_row_refused(streams, &columns, k + 2);
        apart[2 * ((k + 2) * D + 23)] = bag[(k + 2) * D + 23];
    }
    mil_scorer_free(streams);
    mil_scorer_free(needs_all);
    mil_model_free(other);
    end();
}

TEST(with_a_mask_only_real_rows_have_to_be_finite)
{
    enum { M = 9 };
    unsigned char mask[M] = { 1, 1, 0, 1, 1, 1, 0, 1, 1 };
    const int64_t shape = M;
    begin(1, NULL);
    mil_scorer *s = make_scorer(0);
    mil_bag b = bag_of(bag, M);
    b.mask = mil_tensor_make(mask, MIL_U8, 1, &shape);
    mil_real first[C], logits[C];
    CHECK(mil_scorer_score(s, &b) == MIL_OK && mil_scorer_read(s, MIL_LOGITS, first, C) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        bag[2 * D + 3] = not_finite(k);                    // of a masked row
        CHECK(mil_scorer_score(s, &b) == MIL_OK && mil_scorer_read(s, MIL_LOGITS, logits, C) == MIL_OK);
        CHECK(memcmp(first, logits, sizeof first) == 0);
        const mil_real was = bag[7 * D + 3];
        bag[7 * D + 3] = not_finite(k);
        check_row_refused(s, &b, 7);
        bag[7 * D + 3] = was;
    }
    mil_scorer_free(s);
    end();
}

// ---- masks ----
// A mask says real or not: images have 0 and 255, and a mean of masks has halves.
TEST(any_number_but_zero_in_a_mask_is_a_real_row)
{
    static const char *const models[][2] = { { "abmil", "in_dim=24 embed_dim=4 attn_dim=4" }, { "dsmil", "in_dim=24 embed_dim=4 attn_dim=4" }, { "abmil.torchmil", "in_dim=24 att_dim=4" } };
    enum { M = 13, MOST = M * 8 };
    static mil_real first[MIL_RESULT_COUNT][MOST], result[MOST];
    const int64_t shape = M;
    begin(1, NULL);
    for (int k = 0; k < 3; k++) {
        mil_scorer_options o = mil_scorer_options_default();
        mil_model *other = mil_create(ctx, models[k][0], models[k][1]);
        o.results = EVERYTHING;
        mil_scorer *s = mil_scorer_create(other, &o);
        if (!CHECK(s != NULL)) return;
        for (int form = 0; form < 5; form++) {             // 0/1; 0/255; 0/0.5; 0/-3; 0/1, 2, 3 ..
            unsigned char bytes[M];
            float numbers[M];
            mil_bag b = bag_of(bag, M);
            for (int n = 0; n < M; n++) {
                const int real = n % 3 != 1;
                bytes[n] = (unsigned char)(real ? form == 0 ? 1 : form == 1 ? 255 : n + 1 : 0);
                numbers[n] = real ? form == 2 ? 0.5f : -3.0f : 0.0f;
            }
            b.mask = form == 2 || form == 3 ? mil_tensor_make(numbers, MIL_F32, 1, &shape) : mil_tensor_make(bytes, MIL_U8, 1, &shape);
            CHECK(mil_scorer_score(s, &b) == MIL_OK);
            for (int r = 0; r < MIL_RESULT_COUNT; r++) {
                const int64_t count = mil_scorer_count(s, (mil_result)r);
                if (count == 0) continue;                  // a model need not give every result
                if (!CHECK(count <= MOST && mil_scorer_read(s, (mil_result)r, form ? result : first[r], count) == MIL_OK)) continue;
                if (form && !CHECK(memcmp(result, first[r], (size_t)count * sizeof *result) == 0)) printf("%s, %s\n", models[k][0], mil_result_name((mil_result)r));
            }
        }
        mil_scorer_free(s);
        mil_model_free(other);
    }
    end();
}

TEST(attention_of_masked_rows_is_the_lowest_finite_number)
{
    static const char *const models[][2] = {
        { "abmil.torchmil", "in_dim=24 att_dim=4" }, { "abmil.torchmil", "in_dim=24 att_dim=4 gated=true feat_ext_sizes=[6] feat_ext_activations=[relu]" },
        { "abmil", "in_dim=24 embed_dim=4 attn_dim=4" }, { "dsmil", "in_dim=24 embed_dim=4 attn_dim=4" }
    };
    enum { M = 13 };
    const mil_real lowest = (mil_real)(MIL_REAL_IS_FLOAT ? -(double)FLT_MAX : -DBL_MAX);
    unsigned char mask[M];
    const int64_t shape = M;
    begin(1, NULL);
    for (int n = 0; n < M; n++) mask[n] = n % 3 != 1;
    for (int k = 0; k < 4; k++) {
        mil_model *other = mil_create(ctx, models[k][0], models[k][1]);
        mil_scorer *s = mil_scorer_create(other, NULL);
        if (!CHECK(s != NULL)) return;
        mil_real open[2 * M], masked[2 * M];
        mil_bag b = bag_of(bag, M);
        CHECK(mil_scorer_score(s, &b) == MIL_OK);
        const int64_t count = mil_scorer_count(s, MIL_ATTENTION), K = count / M;
        if (!CHECK(count == M || count == 2 * M)) return;
        CHECK(mil_scorer_read(s, MIL_ATTENTION, open, count) == MIL_OK);
        b.mask = mil_tensor_make(mask, MIL_U8, 1, &shape);
        CHECK(mil_scorer_score(s, &b) == MIL_OK && mil_scorer_read(s, MIL_ATTENTION, masked, count) == MIL_OK);
        for (int64_t i = 0; i < count; i++) {
            if (!mask[i / K]) CHECK(masked[i] == lowest);
            else CHECK(masked[i] > lowest);
            if (mask[i / K] && k < 3) CHECK_NEAR(masked[i], open[i], ROUNDING);                // dsmil's scores look at the bag
        }
        mil_scorer_free(s);
        mil_model_free(other);
    }
    end();
}

TEST(coordinates_of_another_number_of_rows_are_refused)
{
    static mil_real places[10];
    begin(1, NULL);
    mil_scorer *s = make_scorer(0);
    mil_tape *tape = NULL;
    mil_outputs out;
    mil_bag b = bag_of(bag, 5);
    CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
    for (int64_t rows = 1; rows < 7; rows++) {
        b.coords = mil_tensor_matrix(places, MIL_REAL_DTYPE, rows < 6 ? rows : 5, rows < 6 ? 2 : 1);
        mil_tape_reset(tape);
        const mil_status recorded = mil_model_record(tape, model, &b, NULL, &out);
        CHECK((recorded == MIL_OK) == (rows == 5));
        CHECK(mil_scorer_score(s, &b) == recorded);
        CHECK(recorded == MIL_OK || mil_error(ctx)[0]);
        CHECK(mil_scorer_count(s, MIL_LOGITS) == (recorded == MIL_OK ? C : 0));
    }
    mil_tape_free(tape);
    mil_scorer_free(s);
    end();
}

// ---- ranks, doubles ----
TEST(ranks_are_places_with_ties_shared_and_masked_rows_left_out)
{
    enum { M = 301 };
    static mil_real rank[M], attention[M];
    static double wide[M];
    unsigned char mask[M];
    begin(1, NULL);
    memcpy(bag + 200 * D, bag + 10 * D, 40 * D * sizeof *bag);                 // ties
    for (int form = 0; form < 2; form++) {
        mil_bag b = bag_of(bag, M);
        for (int n = 0; n < M; n++) mask[n] = !form || n % 5 != 2;
        if (form) {
            const int64_t shape = M;
            b.mask = mil_tensor_make(mask, MIL_U8, 1, &shape);
        }
        mil_scorer_options o = mil_scorer_options_default();
        o.results = 1u << MIL_RANK | 1u << MIL_ATTENTION;
        mil_scorer *s = mil_scorer_create(model, &o);
        CHECK(mil_scorer_score(s, &b) == MIL_OK);
        CHECK(mil_scorer_count(s, MIL_RANK) == M);
        CHECK(mil_scorer_read(s, MIL_RANK, rank, M) == MIL_OK);
        CHECK(mil_scorer_read_f64(s, MIL_RANK, wide, M) == MIL_OK);
        CHECK(mil_scorer_read(s, MIL_ATTENTION, attention, M) == MIL_OK);
        int real = 0;
        for (int n = 0; n < M; n++) real += mask[n];
        for (int n = 0; n < M; n++) {
            int below = 0, same = 0;
            for (int m = 0; m < M; m++) {
                below += mask[m] && attention[m] < attention[n];
                same += mask[m] && attention[m] == attention[n];
            }
            const double expected = mask[n] ? (below + 0.5 * (same - 1)) / (real - 1) : 0;
            CHECK_NEAR(wide[n], expected, 1e-15);
            CHECK_NEAR(rank[n], expected, 1e-7);
            if (!mask[n]) CHECK(attention[n] < (mil_real)-1e38);
        }
        mil_scorer_reset(s);
        CHECK(mil_scorer_push(s, bag, 1, 0, MIL_REAL_DTYPE) == MIL_OK);
        CHECK(mil_scorer_read(s, MIL_RANK, rank, 1) == MIL_OK && rank[0] == 1);
        mil_scorer_free(s);
    }
    end();
}

TEST(doubles_are_the_same_results_and_their_probabilities_sum_to_one)
{
    begin(1, NULL);
    double x[C], p[C], a[200], sum = 0;
    mil_scorer *s = make_scorer(0);
    CHECK(mil_scorer_push(s, bag, 200, 0, MIL_REAL_DTYPE) == MIL_OK);
    read_all(s, &now);
    CHECK(mil_scorer_read_f64(s, MIL_LOGITS, x, C) == MIL_OK);
    CHECK(mil_scorer_read_f64(s, MIL_PROBABILITIES, p, C) == MIL_OK);
    CHECK(mil_scorer_read_f64(s, MIL_ATTENTION, a, 200) == MIL_OK);
    CHECK(mil_scorer_read_f64(s, MIL_ATTENTION, a, 199) == MIL_ERROR_ARGUMENT);
    CHECK(mil_scorer_read_f64(s, MIL_LOGITS, NULL, C) == MIL_ERROR_ARGUMENT);
    for (int c = 0; c < C; c++) {
        CHECK(x[c] == (double)now.logits[c]);
        CHECK_NEAR(p[c], now.probabilities[c], 1e-6);
        sum += p[c];
    }
    CHECK_NEAR(sum, 1, 1e-15);
    for (int n = 0; n < 200; n++) CHECK(a[n] == (double)now.attention[n]);
    mil_scorer_free(s);
    end();
}

// A model whose middle needs all rows at once: each instance less the mean instance, by a product with a [N, N] matrix of 1/N.
typedef struct centred_config { int64_t in_dim, num_classes; } centred_config;
typedef struct centred { mil_linear_layer head; } centred;
static const mil_option centred_options[] = {
    { "in_dim", MIL_OPTION_INT, offsetof(centred_config, in_dim), "24", NULL, "" },
    { "num_classes", MIL_OPTION_INT, offsetof(centred_config, num_classes), "3", NULL, "" }
};
static const mil_config centred_configs[] = { { "base", "" } };

static void centred_declare(mil_builder *b, void *m, const void *config)
{
    const centred_config *c = (const centred_config *)config;
    ((centred *)m)->head = mil_declare_linear(b, c->in_dim, c->num_classes, 1, MIL_LINEAR_TORCH, "head");
}

static void centred_forward(const void *m, const void *config, const mil_inputs *in, mil_outputs *out)
{
    (void)config;
    const int64_t n = in->features->shape[1], shape[3] = { 1, n, n };
    mil_tape_push(in->tape, "centre");
    mil_node *x = mil_sub(in->features, mil_matmul(mil_constant(in->tape, 3, shape, 1.0 / (double)n), in->features));
    mil_tape_pop(in->tape);
    out->logits = mil_squeeze(mil_max(mil_linear_forward(&((const centred *)m)->head, x), 1), 1);
}

// The mean over instances by hand, with a factor 1/N that would be another bag's in a stream.
static void counted_forward(const void *m, const void *config, const mil_inputs *in, mil_outputs *out)
{
    (void)config;
    mil_node *sum = mil_sum(in->features, 1);
    out->logits = mil_linear_forward(&((const centred *)m)->head, mil_squeeze(mil_affine(sum, 1.0 / (double)in->features->shape[1], 0), 1));
}

static mil_architecture centred_architecture(const char *name, void (*forward)(const void *, const void *, const mil_inputs *, mil_outputs *))
{
    mil_architecture arch;
    memset(&arch, 0, sizeof arch);
    arch.name = name;
    arch.prefix = "";
    arch.options = centred_options;
    arch.option_count = 2;
    arch.config_size = sizeof(centred_config);
    arch.configs = centred_configs;
    arch.config_count = 1;
    arch.model_size = sizeof(centred);
    arch.declare = centred_declare;
    arch.forward = forward;
    return arch;
}

TEST(a_model_that_uses_the_number_of_instances_is_not_streamed)
{
    const mil_architecture arch = centred_architecture("counted", counted_forward);
    begin(1, NULL);
    CHECK(mil_register(ctx, &arch) == MIL_OK);
    mil_model *other = mil_create(ctx, "counted", "in_dim=24");
    mil_scorer *s = mil_scorer_create(other, NULL);
    CHECK(mil_scorer_push(s, bag, 4, 0, MIL_REAL_DTYPE) == MIL_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(mil_error(ctx), "affine depends on the number of instances");
    const mil_bag b = bag_of(bag, 4);
    CHECK(mil_scorer_score(s, &b) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_OK);
    const mil_real *w = (const mil_real *)mil_model_find(other, "head.weight")->data, *c = (const mil_real *)mil_model_find(other, "head.bias")->data;
    for (int k = 0; k < C; k++) {
        double y = (double)c[k];
        for (int j = 0; j < D; j++) y += (double)w[k * D + j] * (double)(bag[j] + bag[D + j] + bag[2 * D + j] + bag[3 * D + j]) / 4;
        CHECK_NEAR(now.logits[k], y, ROUNDING);
    }
    mil_scorer_free(s);
    mil_model_free(other);
    end();
}

TEST(a_model_that_needs_all_rows_is_refused_with_its_op_and_scored_whole)
{
    const mil_architecture arch = centred_architecture("centred", centred_forward);
    begin(1, NULL);
    CHECK(mil_register(ctx, &arch) == MIL_OK);
    mil_model *other = mil_create(ctx, "centred", "in_dim=24");
    if (!CHECK(other != NULL)) { puts(mil_error(ctx)); return; }
    mil_scorer *s = mil_scorer_create(other, NULL);
    if (!CHECK(s != NULL)) { puts(mil_error(ctx)); return; }
    CHECK(mil_scorer_count(s, MIL_LOGITS) == 0);
    CHECK(mil_scorer_push(s, bag, 4, 0, MIL_REAL_DTYPE) == MIL_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(mil_error(ctx), "centred.base.uni.none cannot be streamed");
    CHECK_CONTAINS(mil_error(ctx), "linear needs all instances at once");
    CHECK_CONTAINS(mil_error(ctx), "centre");
    CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_ERROR_STATE);
    mil_real first[C];
    for (int64_t n = 1; n <= 40; n += 13) {
        const mil_bag b = bag_of(bag, n);
        CHECK(mil_scorer_score(s, &b) == MIL_OK);
        CHECK(mil_scorer_instances(s) == n);
        CHECK(mil_scorer_read(s, MIL_LOGITS, first, C) == MIL_OK);
        CHECK(mil_scorer_read(s, MIL_ATTENTION, now.attention, n) == MIL_ERROR_UNSUPPORTED);
        const mil_param *w = mil_model_find(other, "head.weight"), *c = mil_model_find(other, "head.bias");
        for (int k = 0; k < C; k++) {
            double best = -1e30;
            for (int64_t i = 0; i < n; i++) {
                double y = (double)((const mil_real *)c->data)[k];
                for (int j = 0; j < D; j++) {
                    double mean = 0;
                    for (int64_t r = 0; r < n; r++) mean += (double)bag[r * D + j] / (double)n;
                    y += (double)((const mil_real *)w->data)[k * D + j] * ((double)bag[i * D + j] - mean);
                }
                best = y > best ? y : best;
            }
            CHECK_NEAR(first[k], best, ROUNDING);
        }
    }
    mil_scorer_free(s);
    const size_t before = mil_context_bytes(ctx), announced = mil_scorer_bytes(other, NULL, 40);
    CHECK(mil_context_bytes(ctx) == before);
    const mil_bag b = bag_of(bag, 40);
    s = mil_scorer_create(other, NULL);
    CHECK(mil_scorer_score(s, &b) == MIL_OK);
    const size_t held = mil_context_bytes(ctx) - before;
    if (!CHECK(held <= announced && announced <= held + held / 10 + 4096)) printf("%d announced, %d held\n", (int)announced, (int)held);
    mil_scorer_free(s);
    mil_model_free(other);
    end();
}

// ---- memory ----
TEST(scoring_allocates_nothing_after_set_up)
{
    for (int threads = 1; threads <= 3; threads += 2) {
        begin(threads, NULL);
        mil_scorer *s = make_scorer(N);
        const long calls = mem.calls;
        const size_t bytes = mem.bytes;
        const mil_bag b = bag_of(bag, N);
        for (int k = 0; k < 3; k++) {
            CHECK(mil_scorer_score(s, &b) == MIL_OK);
            read_all(s, &now);
            mil_scorer_reset(s);
            for (int64_t at = 0; at < N; at += 100) {
                CHECK(mil_scorer_push(s, bag + at * D, 100, 0, MIL_REAL_DTYPE) == MIL_OK);
                CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_OK);
            }
        }
        CHECK(mem.calls == calls && mem.bytes == bytes);
        mil_scorer_free(s);
        end();
    }
}

TEST(a_bag_that_outgrows_the_reserve_keeps_its_bits)
{
    begin(1, NULL);
    fill_bag();
    static mil_real large[5000 * D];
    static mil_real a[5000], b[5000];
    uint64_t state = 9;
    for (int i = 0; i < 5000 * D; i++) large[i] = (mil_real)memory_noise(&state);
    mil_scorer *grown = mil_scorer_create(model, NULL), *made = make_scorer(5000);
    for (int64_t at = 0; at < 5000; at += 500) {
        CHECK(mil_scorer_push(grown, large + at * D, 500, 0, MIL_REAL_DTYPE) == MIL_OK);
        CHECK(mil_scorer_push(made, large + at * D, 500, 0, MIL_REAL_DTYPE) == MIL_OK);
    }
    mil_real x[C], y[C];
    CHECK(mil_scorer_read(grown, MIL_LOGITS, x, C) == MIL_OK && mil_scorer_read(made, MIL_LOGITS, y, C) == MIL_OK);
    CHECK(memcmp(x, y, sizeof x) == 0);
    CHECK(mil_scorer_read(grown, MIL_ATTENTION, a, 5000) == MIL_OK && mil_scorer_read(made, MIL_ATTENTION, b, 5000) == MIL_OK);
    CHECK(memcmp(a, b, sizeof a) == 0);
    mil_scorer_free(grown);
    mil_scorer_free(made);
    end();
}

TEST(bytes_are_known_beforehand)
{
    static const int64_t sizes[] = { 1, 1024, 1500, 4000 };
    for (int threads = 1; threads <= 2; threads++)
        for (int k = 0; k < 4; k++) {
            begin(threads, NULL);
            mil_scorer_options o = mil_scorer_options_default();
            o.capacity = sizes[k];
            const size_t before = mil_context_bytes(ctx), announced = mil_scorer_bytes(model, &o, sizes[k]);
            CHECK(mil_context_bytes(ctx) == before);
            mil_scorer *s = mil_scorer_create(model, &o);
            const mil_bag b = bag_of(bag, sizes[k] < N ? sizes[k] : (int64_t)N);
            CHECK(mil_scorer_score(s, &b) == MIL_OK);
            CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_OK);
            const size_t held = mil_context_bytes(ctx) - before;
            if (!CHECK(held <= announced && announced <= held + held / 10 + 8192)) printf("%d instances: %d announced, %d held\n", (int)sizes[k], (int)announced, (int)held);
            mil_scorer_free(s);
            o.results = EVERYTHING;                        // and what the allocator gave for it, headers included
            const size_t given = mem.bytes, all = mil_scorer_bytes(model, &o, sizes[k]);
            s = mil_scorer_create(model, &o);
            CHECK(mil_scorer_score(s, &b) == MIL_OK);
            if (!CHECK(mem.bytes - given <= all)) printf("%d instances: %d announced, %d given\n", (int)sizes[k], (int)all, (int)(mem.bytes - given));
            mil_scorer_free(s);
            CHECK(mil_context_bytes(ctx) == before);
            end();
        }
}

// A transformer's weights are the class token's attention to the patches; what it pays to itself is the rest.
TEST(a_transformer_weighs_each_patch)
{
    enum { PATCHES = 7 };
    mil_context *c = NULL;
    mil_real w[PATCHES];
    float x[PATCHES * 4];
    CHECK(mil_context_create(&c, NULL) == MIL_OK);
    mil_model *m = mil_create(c, "transformer", "in_dim=4 embed_dim=8 num_heads=2 encoder_mlp_dim=8");
    mil_scorer_options o = mil_scorer_options_default();
    o.results = 1u << MIL_WEIGHTS;
    mil_scorer *s = mil_scorer_create(m, &o);
    for (int i = 0; i < PATCHES * 4; i++) x[i] = (float)(i * 5 % 11) / 4;
    const mil_bag b = mil_bag_make(x, PATCHES, 4);
    double sum = 0;
    CHECK(mil_scorer_score(s, &b) == MIL_OK && mil_scorer_count(s, MIL_WEIGHTS) == PATCHES);
    if (CHECK(mil_scorer_read(s, MIL_WEIGHTS, w, PATCHES) == MIL_OK))
        for (int i = 0; i < PATCHES; i++) {
            CHECK(w[i] > 0);
            sum += (double)w[i];
        }
    CHECK(sum > 0.1 && sum < 1);
    mil_scorer_free(s);
    mil_model_free(m);
    mil_context_free(c);
}

TEST(memory_grows_by_the_scores_alone)
{
    begin(1, NULL);
    mil_scorer_options o = mil_scorer_options_default();
    o.results = 0;
    const size_t none = mil_scorer_bytes(model, &o, 2000), many = mil_scorer_bytes(model, &o, 2000000);
    CHECK(none > 0 && many == none);                       // logits alone: not a byte per instance
    o.results = 1u << MIL_ATTENTION;
    const size_t few = mil_scorer_bytes(model, &o, 2000), lots = mil_scorer_bytes(model, &o, 2002000);
    const double each = (double)(lots - few) / 2000000;
    CHECK(each >= sizeof(mil_real) && each < 1.01 * sizeof(mil_real));
    end();
}

TEST(each_failing_allocation_is_an_error_and_the_bag_is_as_before)
{
    begin(1, NULL);
    score_whole(100, &whole);
    for (int after = 0; after < 2; after++) {
        int done = 0;
        long at;
        for (at = 0; at < 3000 && !done; at++) {           // creating
            const size_t before = mil_context_bytes(ctx);
            mem.fail_at = mem.calls + at;
            mem.fail_after = after;
            mil_scorer *s = mil_scorer_create(model, NULL);
            mem.fail_at = -1;
            done = s != NULL;
            if (!done) CHECK(mil_error_status(ctx) == MIL_ERROR_NO_MEMORY && mil_error(ctx)[0] != 0);
            mil_scorer_free(s);
            CHECK(mil_context_bytes(ctx) == before);
        }
        CHECK(done && at > 10);
        done = 0;
        for (at = 0; at < 3000 && !done; at++) {           // growing from 1024 and more
            mil_scorer_options o = mil_scorer_options_default();
            static mil_real many[1600 * D];
            o.results = EVERYTHING;
            mil_scorer *s = mil_scorer_create(model, &o);
            if (!CHECK(s != NULL)) return;
            CHECK(mil_scorer_push(s, bag, 60, 0, MIL_REAL_DTYPE) == MIL_OK);
            mem.fail_at = mem.calls + at;
            mem.fail_after = after;
            const mil_status status = mil_scorer_push(s, many, 1600, 0, MIL_REAL_DTYPE);
            mem.fail_at = -1;
            done = status == MIL_OK;
            CHECK(done || status == MIL_ERROR_NO_MEMORY);
            if (!done) {
                CHECK(mil_scorer_instances(s) == 60);
                CHECK(mil_scorer_push(s, bag + 60 * D, 40, 0, MIL_REAL_DTYPE) == MIL_OK);
                read_all(s, &now);
                CHECK(same_bits(&whole, &now));
            }
            mil_scorer_free(s);
        }
        CHECK(done && at > 10);
    }
    mil_scorer *s = make_scorer(0);                        // bytes in a context without memory: 0, and no leak
    const size_t before = mil_context_bytes(ctx);
    mem.fail_at = mem.calls;
    mem.fail_after = 1;
    CHECK(mil_scorer_bytes(model, NULL, 10) == 0);
    mem.fail_at = -1;
    CHECK(mil_context_bytes(ctx) == before);
    mil_scorer_free(s);
    end();
}

TEST(a_fixed_block_of_the_announced_size_is_enough)
{
    static char block[4 << 20];
    static const int64_t sizes[] = { 1, 1200, 1500 };
    mil_context_options o = mil_context_options_default();
    o.threads = 1;
    o.memory = block;
    for (int k = 0; k < 3; k++) {
        mil_scorer_options so = mil_scorer_options_default();
        so.capacity = sizes[k];
        so.results = EVERYTHING;
        begin(1, NULL);
        const size_t held = mil_context_bytes(ctx) + 128 * (size_t)mil_model_param_count(model), scorer = mil_scorer_bytes(model, &so, sizes[k]);
        end();
        const mil_bag b = bag_of(bag, sizes[k]);
        o.memory_size = 3072 + held + 1024 + scorer;       // as mil_scorer_bytes says
        CHECK(mil_context_create(&ctx, &o) == MIL_OK);
        model = mil_create(ctx, NAME, OPTIONS);
        CHECK(model != NULL);
        mil_scorer *s = mil_scorer_create(model, &so);
        if (CHECK(s != NULL)) CHECK(mil_scorer_score(s, &b) == MIL_OK);
        else printf("%d: %s\n", (int)sizes[k], mil_error(ctx));
        mil_scorer_free(s);
        mil_model_free(model);
        mil_context_free(ctx);
    }
}

// Ranks need the order of all rows; a model that does not stream is told so only while it is recorded.
TEST(a_fixed_block_of_the_announced_size_is_enough_for_a_model_that_needs_all_rows)
{
    static const char *const models[][2] = {
        { "transmil", "in_dim=24 embed_dim=8" }, { "transformer", "in_dim=24 embed_dim=8" }, { "wikg", "in_dim=24 embed_dim=8" },
        { "ilra", "in_dim=24 embed_dim=8" }, { "dsmil", "in_dim=24 embed_dim=8 attn_dim=4" }, { "clam", "in_dim=24 embed_dim=8 attention_dim=4" }
    };
    enum { M = 60 };
    static char block[8 << 20];
    fill_bag();
    const mil_bag b = bag_of(bag, M);
    for (int k = 0; k < 6; k++)
        for (int form = 0; form < 2; form++) {             // without and with a reserve
            mil_context_options o = mil_context_options_default();
            mil_scorer_options so = mil_scorer_options_default();
            mil_real rank[2 * M];
            so.results |= 1u << MIL_RANK;
            so.capacity = form ? M : 0;
            o.threads = 1;
            ctx = memory_context(&mem, 1, NULL);
            model = mil_create(ctx, models[k][0], models[k][1]);
            const size_t held = mil_context_bytes(ctx) + 128 * (size_t)mil_model_param_count(model), scorer = mil_scorer_bytes(model, &so, M);
            end();
            o.memory = block;
            o.memory_size = 3072 + held + 1024 + scorer;   // as mil_scorer_bytes says
            if (!CHECK(scorer > 0 && o.memory_size <= sizeof block && mil_context_create(&ctx, &o) == MIL_OK)) return;
            model = mil_create(ctx, models[k][0], models[k][1]);
            mil_scorer *s = mil_scorer_create(model, &so);
            if (!CHECK(s && mil_scorer_score(s, &b) == MIL_OK)) printf("%s: %s\n", models[k][0], mil_error(ctx));
            const int64_t count = mil_scorer_count(s, MIL_RANK);
            if (count) CHECK(count <= 2 * M && mil_scorer_read(s, MIL_RANK, rank, count) == MIL_OK);
            mil_scorer_free(s);
            mil_model_free(model);
            mil_context_free(ctx);
        }
}

TEST(growing_takes_three_times_the_announced_at_most)
{
    begin(1, NULL);
    const int64_t n = 1500;
    const size_t given = mem.bytes, announced = mil_scorer_bytes(model, NULL, n);
    mil_scorer *s = mil_scorer_create(model, NULL);
    for (int64_t at = 0; at < n; at += 100) CHECK(mil_scorer_push(s, bag + at * D, 100, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mem.bytes - given <= 3 * announced);
    CHECK(mil_context_peak_bytes(ctx) - given <= 3 * announced);
    mil_scorer_free(s);
    end();
}

TEST(everything_in_one_fixed_block)
{
    static char block[4 << 20];
    fill_bag();
    begin(1, NULL);
    mil_model_init(model, 5);
    score_whole(N, &whole);
    end();
    mil_context_options o = mil_context_options_default();
    o.threads = 1;
    o.memory = block;
    o.memory_size = sizeof block;
    CHECK(mil_context_create(&ctx, &o) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        model = mil_create(ctx, NAME, OPTIONS);
        CHECK(model != NULL && mil_model_init(model, 5) == MIL_OK);
        mil_scorer *s = make_scorer(N);
        CHECK(mil_scorer_push(s, bag, N, 0, MIL_REAL_DTYPE) == MIL_OK);
        read_all(s, &now);
        CHECK(same_bits(&whole, &now));
        mil_scorer_free(s);
        mil_model_free(model);
    }
    CHECK(mil_create(ctx, NAME, "embed_dim=4096") == NULL);
    CHECK(mil_error_status(ctx) == MIL_ERROR_NO_MEMORY);
    model = mil_create(ctx, NAME, OPTIONS);
    CHECK(model != NULL);
    mil_model_free(model);
    mil_context_free(ctx);
    o.memory_size = 64;
    CHECK(mil_context_create(&ctx, &o) == MIL_ERROR_ARGUMENT || ctx == NULL);
}

// ---- what pooling means ----
TEST(every_patch_twice_changes_no_logit)
{
    begin(1, NULL);
    score_whole(600, &whole);
    memcpy(bag + 600 * D, bag, 600 * D * sizeof *bag);
    score_whole(1200, &now);
    for (int c = 0; c < C; c++) CHECK_NEAR(now.logits[c], whole.logits[c], ROUNDING);
    for (int n = 0; n < 600; n++) CHECK_NEAR(2 * now.weights[n], whole.weights[n], ROUNDING);
    end();
}

TEST(permuted_rows_permute_attention_and_keep_logits)
{
    begin(1, NULL);
    static mil_real turned[N * D];
    score_whole(N, &whole);
    for (int n = 0; n < N; n++) memcpy(turned + (n * 7 % N) * D, bag + n * D, D * sizeof *bag);                 // 7 and N share no factor
    memcpy(bag, turned, sizeof turned);
    score_whole(N, &now);
    for (int c = 0; c < C; c++) CHECK_NEAR(now.logits[c], whole.logits[c], ROUNDING);
    for (int n = 0; n < N; n++) {
        CHECK_NEAR(now.attention[n * 7 % N], whole.attention[n], ROUNDING);
        for (int c = 0; c < C; c++) CHECK_NEAR(now.contribution[n * 7 % N * C + c], whole.contribution[n * C + c], ROUNDING);
    }
    end();
}

TEST(contributions_and_bias_sum_to_the_logits)
{
    begin(1, NULL);
    score_whole(N, &whole);
    const mil_real *bias = (const mil_real *)mil_model_find(model, "classifier.bias")->data;
    for (int c = 0; c < C; c++) {
        double sum = (double)bias[c];
        for (int n = 0; n < N; n++) sum += (double)whole.contribution[n * C + c];
        CHECK_NEAR(sum, whole.logits[c], ROUNDING);
    }
    end();
}

TEST(a_nan_in_a_masked_row_spoils_nothing)
{
    begin(1, NULL);
    score_whole(500, &whole);
    unsigned char mask[700];
    static mil_real padded[700 * D];
    int64_t real = 0;
    for (int n = 0; n < 700; n++) {
        mask[n] = n % 7 < 5;
        for (int j = 0; j < D; j++) padded[n * D + j] = mask[n] ? bag[real * D + j] : (mil_real)(n % 2 ? (double)NAN : (double)INFINITY);
        real += mask[n];
    }
    CHECK(real == 500);
    mil_bag b = bag_of(padded, 700);
    b.mask = mil_tensor_matrix(mask, MIL_U8, 1, 700);
    b.mask.rank = 1;
    b.mask.shape[0] = 700;
    mil_scorer *s = make_scorer(0);
    CHECK(mil_scorer_score(s, &b) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_LOGITS, now.logits, C) == MIL_OK);
    for (int c = 0; c < C; c++) CHECK_NEAR(now.logits[c], whole.logits[c], ROUNDING);
    CHECK(mil_scorer_read(s, MIL_WEIGHTS, now.weights, 700) == MIL_OK);
    for (int n = 0, k = 0; n < 700; n++) {
        CHECK_NEAR(now.weights[n], mask[n] ? whole.weights[k] : 0, ROUNDING);
        k += mask[n];
    }
    mil_scorer_free(s);
    end();
}

// Weights as large as numbers can be make logits that are no numbers: an error, not an answer, until weights are fine again.
TEST(logits_that_are_not_finite_are_an_error)
{
    static const unsigned char mask[9] = { 1, 1, 0, 1, 1, 1, 0, 1, 1 };
    const int64_t shape = 9;
    mil_real weight[C * 20], huge[C * 20], logits[C], attention[9];
    begin(1, NULL);
    mil_scorer *s = make_scorer(0);
    mil_param *p = mil_model_find(model, "classifier.weight");
    if (!CHECK(p && mil_param_read(p, weight, C * 20) == MIL_OK)) return;
    for (int i = 0; i < C * 20; i++) huge[i] = (mil_real)(i % 2 ? 1 : -1) * (sizeof(mil_real) == 4 ? (mil_real)3e38 : (mil_real)1e308);
    for (int masked = 0; masked < 2; masked++) {
        mil_bag b = bag_of(bag, 9);
        if (masked) b.mask = mil_tensor_make(mask, MIL_U8, 1, &shape);
        for (int k = 0; k < 9 * D; k++) bag[k] *= 100;
        CHECK(mil_param_write(p, huge, C * 20) == MIL_OK);
        CHECK(mil_scorer_score(s, &b) == MIL_ERROR_NUMERIC);
        CHECK_CONTAINS(mil_error(ctx), "mil_scorer_score: the logits are NaN or infinite");
        CHECK(mil_scorer_read(s, MIL_ATTENTION, attention, 9) != MIL_OK && mil_scorer_read(s, MIL_LOGITS, logits, C) != MIL_OK);
        mil_scorer_reset(s);
        CHECK(mil_scorer_push(s, bag, 9, 0, MIL_REAL_DTYPE) == MIL_OK);
        CHECK(mil_scorer_read(s, MIL_ATTENTION, attention, 9) == MIL_ERROR_NUMERIC);
        CHECK_CONTAINS(mil_error(ctx), "mil_scorer_read: the logits are NaN or infinite");
        CHECK(mil_param_write(p, weight, C * 20) == MIL_OK);
        CHECK(mil_scorer_score(s, &b) == MIL_OK && mil_scorer_read(s, MIL_LOGITS, logits, C) == MIL_OK && mil_scorer_read(s, MIL_ATTENTION, attention, 9) == MIL_OK);
        fill_bag();
    }
    mil_scorer_free(s);
    end();
}

TEST(one_logit_gives_the_sigmoid)
{
    fill_bag();
    ctx = memory_context(&mem, 1, NULL);
    model = mil_create(ctx, "abmil.torchmil", "in_dim=24 att_dim=8");
    mil_scorer *s = mil_scorer_create(model, NULL);
    mil_real x = 0, p = 0;
    CHECK(mil_scorer_push(s, bag, 40, 0, MIL_REAL_DTYPE) == MIL_OK);
    CHECK(mil_scorer_read(s, MIL_LOGITS, &x, 1) == MIL_OK && mil_scorer_read(s, MIL_PROBABILITIES, &p, 1) == MIL_OK);
    CHECK_NEAR(p, 1 / (1 + exp(-(double)x)), 1e-6);
    double wide = 0;
    CHECK(mil_scorer_read_f64(s, MIL_PROBABILITIES, &wide, 1) == MIL_OK);
    CHECK_NEAR(wide, 1 / (1 + exp(-(double)x)), 1e-15);
    CHECK_STRING(mil_result_name(MIL_PROBABILITIES), "probabilities");

    static const int64_t shape[3] = { 2, 20, D };          // two bags: each its own
    mil_real both[2], probability[2];
    mil_bag two;
    memset(&two, 0, sizeof two);
    two.features = mil_tensor_make(bag, MIL_REAL_DTYPE, 3, shape);
    CHECK(mil_scorer_score(s, &two) == MIL_OK && mil_scorer_read(s, MIL_LOGITS, both, 2) == MIL_OK && mil_scorer_read(s, MIL_PROBABILITIES, probability, 2) == MIL_OK);
    CHECK(both[0] != both[1]);
    for (int b = 0; b < 2; b++) CHECK_NEAR(probability[b], 1 / (1 + exp(-(double)both[b])), 1e-6);
    mil_scorer_free(s);
    end();
}

TESTS(
    T(of_several_rows_that_are_not_finite_the_first_is_named) T(ranks_under_a_mask_are_each_columns_own) T(logits_that_are_not_finite_are_an_error) T(a_result_that_was_not_asked_for_is_told_from_one_that_does_not_exist)
    T(a_scorer_follows_the_weights)
    T(a_push_after_a_whole_bag_begins_another)
    T(a_batch_gives_its_bags_results_one_after_the_other)
    T(ranks_are_places_with_ties_shared_and_masked_rows_left_out)
    T(doubles_are_the_same_results_and_their_probabilities_sum_to_one)
    T(a_fixed_block_of_the_announced_size_is_enough)
    T(growing_takes_three_times_the_announced_at_most)
    T(whole_bag_agrees_with_the_recorded_model)
    T(pushes_of_any_size_give_the_bits_of_the_whole_bag)
    T(any_number_of_threads_gives_the_same_bits)
    T(results_so_far_are_those_of_a_bag_that_ends_there_and_change_nothing)
    T(bfloat_products_are_near_and_keep_their_bits_in_any_pieces)
    T(a_scorer_is_used_again_after_reset)
    T(a_masked_bag_between_streams_leaves_no_trace)
    T(rows_of_any_type_stride_and_alignment)
    T(rows_that_are_not_finite_are_refused_and_the_bag_is_as_before)
    T(arguments_that_make_no_sense_are_refused)
    T(a_model_that_uses_the_number_of_instances_is_not_streamed)
    T(a_model_that_needs_all_rows_is_refused_with_its_op_and_scored_whole)
    T(scoring_allocates_nothing_after_set_up)
    T(a_bag_that_outgrows_the_reserve_keeps_its_bits)
    T(bytes_are_known_beforehand)
    T(a_transformer_weighs_each_patch)
    T(memory_grows_by_the_scores_alone)
    T(each_failing_allocation_is_an_error_and_the_bag_is_as_before)
    T(everything_in_one_fixed_block)
    T(every_patch_twice_changes_no_logit)
    T(permuted_rows_permute_attention_and_keep_logits)
    T(contributions_and_bias_sum_to_the_logits)
    T(a_nan_in_a_masked_row_spoils_nothing)
    T(one_logit_gives_the_sigmoid)
    T(a_model_that_needs_all_rows_refuses_one_that_is_not_finite)
    T(a_batch_of_a_model_that_streams_refuses_a_row_that_is_not_finite)
    T(halves_and_columns_apart_are_looked_at_where_they_are)
    T(with_a_mask_only_real_rows_have_to_be_finite)
    T(any_number_but_zero_in_a_mask_is_a_real_row)
    T(attention_of_masked_rows_is_the_lowest_finite_number)
    T(coordinates_of_another_number_of_rows_are_refused)
    T(a_fixed_block_of_the_announced_size_is_enough_for_a_model_that_needs_all_rows)
)
