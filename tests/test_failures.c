// build: float double
// Every public call that can allocate, with each of its allocations failing in turn, once and for good: an error and its
// sentence, nothing leaked, nothing half-changed, and the same call works right after. Tapes, scorers, trainers and files
// have the same loop in their own tests; here are models, their files, metrics and contexts, and every architecture, op and layer
// while it is recorded, run and trained. Then a disk that is full. test_failures_pieces.c has the same with finer allocations.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>
#include "mil.h"
#include "check.h"
#include "memory.h"
#include "narrow.h"

#define SMALL "in_dim=4 embed_dim=3 attn_dim=2"
static memory mem;
static const char *path;                                   // of a file of weights that fits SMALL

typedef struct subject {
    mil_model *model;
    void      *bytes;                                      // the model as a file in memory
    size_t     size;
    double     out[256];                                   // what the call gave, to compare
} subject;

static mil_bag small_bag(float x[20])
{
    for (int i = 0; i < 20; i++) x[i] = (float)(i % 7) / 2 - 1;
    return mil_bag_make(x, 5, 4);
}

static mil_status describe(subject *s, mil_model *model, mil_context *ctx)     // a model's weights and texts as numbers
{
    int at = 0;
    if (!model) return mil_error_status(ctx);
    for (int64_t i = 0; i < mil_model_param_count(model); i++) {
        const mil_param *p = mil_model_param(model, i);
        for (int64_t k = 0; k < p->count && at < 200; k++) s->out[at++] = (double)((const mil_real *)p->data)[k];
    }
    for (int i = 0; i < 2; i++) s->out[at++] = mil_model_class_name(model, i) ? (double)mil_model_class_name(model, i)[0] : 0;
    s->out[at] = mil_model_metadata(model, "note") ? (double)mil_model_metadata(model, "note")[0] : 0;
    return MIL_OK;
}

// ---- the calls; each leaves s->model and the context as they were, but for what it is there to change ----
static mil_status call_create(mil_context *ctx, subject *s)
{
    mil_model *m = mil_create(ctx, "abmil", SMALL " num_fc_layers=2");
    const mil_status status = describe(s, m, ctx);
    mil_model_free(m);
    return status;
}

static mil_status call_open_memory(mil_context *ctx, subject *s)
{
    mil_model *m = mil_open_memory(ctx, s->bytes, s->size);
    const mil_status status = describe(s, m, ctx);
    mil_model_free(m);
    return status;
}

static mil_status call_open(mil_context *ctx, subject *s)
{
    mil_model *m = mil_open(ctx, path);
    const mil_status status = describe(s, m, ctx);
    mil_model_free(m);
    return status;
}

static mil_status call_load_memory(mil_context *ctx, subject *s)
{
    const mil_status status = mil_load_memory(s->model, s->bytes, s->size, NULL);
    describe(s, s->model, ctx);
    return status;
}

static mil_status call_load(mil_context *ctx, subject *s)
{
    const mil_status status = mil_load(s->model, path);
    describe(s, s->model, ctx);
    return status;
}

static mil_status call_save_memory(mil_context *ctx, subject *s)
{
    size_t size = 0;
    mil_status status = mil_save_memory(s->model, NULL, &size);
    unsigned char *bytes = (unsigned char *)malloc(size + 1);
    unsigned hash = 0;
    (void)ctx;
    if (status == MIL_OK) status = mil_save_memory(s->model, bytes, &size);
    if (status == MIL_OK) for (size_t i = 0; i < size; i++) hash = hash * 31 + bytes[i];
    s->out[0] = hash;
    free(bytes);
    return status;
}

static mil_status call_save(mil_context *ctx, subject *s)
{
    (void)ctx;
    return mil_save(s->model, path);
}

static mil_status call_names(mil_context *ctx, subject *s)
{
    static const char *const names[] = { "normal", "tumor" };
    const mil_status status = mil_model_set_class_names(s->model, names, 2);
    describe(s, s->model, ctx);
    return status;
}

static mil_status call_metadata(mil_context *ctx, subject *s)
{
    const mil_status status = mil_model_set_metadata(s->model, "note", "x");
    describe(s, s->model, ctx);
    return status;
}

static mil_status score_bag(mil_context *ctx, subject *s, const mil_bag *bag)
{
    mil_real y[2] = { 0, 0 };
    mil_scorer *scorer = mil_scorer_create(s->model, NULL);
    mil_status status = scorer ? mil_scorer_score(scorer, bag) : mil_error_status(ctx);
    if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_LOGITS, y, 2);
    mil_scorer_free(scorer);
    s->out[0] = (double)y[0];
    s->out[1] = (double)y[1];
    return status;
}

static mil_status call_score(mil_context *ctx, subject *s)
{
    float x[20];
    const mil_bag bag = small_bag(x);
    return score_bag(ctx, s, &bag);
}

static mil_status call_masked(mil_context *ctx, subject *s)
{
    float x[20];
    static const unsigned char mask[5] = { 1, 1, 0, 1, 1 };
    const int64_t shape[1] = { 5 };
    mil_bag bag = small_bag(x);
    bag.mask = mil_tensor_make(mask, MIL_BOOL, 1, shape);
    return score_bag(ctx, s, &bag);
}

#ifndef MIL_NO_TRAINING
static mil_status call_train_state(mil_context *ctx, subject *s)               // two steps, save, restore, one more step
{
    float x[20];
    const mil_bag bag = small_bag(x);
    const mil_target target = mil_target_class(1);
    double loss = 0;
    size_t size = 0;
    void *state = NULL;
    mil_model *m = mil_create(ctx, "abmil", SMALL);
    mil_trainer *t = m ? mil_trainer_create(m, "optimizer=adamw lr=0.01 ema=0.9") : NULL;
    mil_status status = t ? MIL_OK : mil_error_status(ctx);
    if (status == MIL_OK) status = mil_trainer_step(t, &bag, &target, &loss, NULL);
    if (status == MIL_OK) status = mil_trainer_step(t, &bag, &target, &loss, NULL);
    if (status == MIL_OK) status = mil_trainer_save(t, NULL, &size);
    if (status == MIL_OK) state = malloc(size);
    if (status == MIL_OK) status = mil_trainer_save(t, state, &size);
    if (status == MIL_OK) status = mil_trainer_restore(t, state, size);
    if (status == MIL_OK) status = mil_trainer_step(t, &bag, &target, &loss, NULL);
    if (status == MIL_OK) describe(s, m, ctx);
    s->out[255] = loss;
    free(state);
    mil_trainer_free(t);
    mil_model_free(m);
    return status;
}
#endif

#ifndef MIL_NO_METRICS
static const double scores[24] = { .1, .9, .3, .7, .8, .2, .6, .4, .5, .5, .25, .75, .9, .1, .45, .55, .2, .8, .65, .35, .3, .7, .15, .85 };
static const int64_t labels[12] = { 1, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1 };

static mil_status call_metrics(mil_context *ctx, subject *s)
{
    mil_metrics m;
    memset(&m, 0, sizeof m);
    const mil_status status = mil_metrics_compute(ctx, scores, labels, 12, 2, &m);
    s->out[0] = m.auroc;
    s->out[1] = m.kappa;
    s->out[2] = m.ece;
    return status;
}

static mil_status call_bootstrap(mil_context *ctx, subject *s)
{
    mil_interval i[MIL_METRIC_COUNT];
    mil_bootstrap_options o = mil_bootstrap_default();
    memset(i, 0, sizeof i);
    o.resamples = 20;
    const mil_status status = mil_metrics_bootstrap(ctx, scores, labels, 12, 2, &o, i);
    for (int k = 0; k < MIL_METRIC_COUNT; k++) s->out[k] = i[k].low;
    return status;
}

static mil_status call_rank(mil_context *ctx, subject *s)
{
    double per_class[2] = { 0, 0 };
    mil_cindex c;
    mil_interval i;
    memset(&c, 0, sizeof c);
    memset(&i, 0, sizeof i);
    mil_bootstrap_options o = mil_bootstrap_default();
    o.resamples = 20;
    mil_status status = mil_metric_auroc(ctx, scores, labels, 12, &s->out[0]);
    if (status == MIL_OK) status = mil_metric_average_precision(ctx, scores, labels, 12, &s->out[1]);
    if (status == MIL_OK) status = mil_metric_auroc_ovr(ctx, scores, labels, 12, 2, MIL_AVERAGE_MACRO, per_class, &s->out[2]);
    if (status == MIL_OK) status = mil_metric_youden(ctx, scores, labels, 12, &s->out[3], &s->out[4]);
    if (status == MIL_OK) status = mil_metric_cindex(ctx, scores, scores + 12, labels, 12, 1e-8, &c);
    if (status == MIL_OK) status = mil_cindex_bootstrap(ctx, scores, scores + 12, labels, 12, 1e-8, &o, &i);
    if (status == MIL_OK) status = mil_temperature_fit(ctx, scores, labels, 12, 2, &s->out[5], NULL);
    s->out[6] = c.value;
    s->out[7] = i.high;
    return status;
}
#endif

static void each_allocation(const char *name, mil_status (*call)(mil_context *ctx, subject *s))
{
    mil_context *ctx = memory_context(&mem, 1, NULL);
    subject s, reference;
    memset(&s, 0, sizeof s);
    s.model = mil_create(ctx, "abmil", SMALL);
    if (!CHECK(s.model && mil_save_memory(s.model, NULL, &s.size) == MIL_OK)) return;
    s.bytes = malloc(s.size);
    CHECK(mil_save_memory(s.model, s.bytes, &s.size) == MIL_OK && mil_save(s.model, path) == MIL_OK);
    CHECK(mil_model_init(s.model, 5) == MIL_OK);           // now the file differs from the model
    double before[256];
    long calls = mem.calls;
    if (!CHECK(call(ctx, &s) == MIL_OK)) printf("  %s: %s\n", name, mil_error(ctx));
    calls = mem.calls - calls;
    reference = s;
    CHECK(calls > 0 && calls < 5000);
    mil_model_init(s.model, 5);
    mil_model_set_metadata(s.model, "note", NULL);
    memset(s.out, 0, sizeof s.out);
    describe(&s, s.model, ctx);
    memcpy(before, s.out, sizeof before);
    for (int after = 0; after < 2; after++) {
        for (long n = 0; n < calls; n++) {
            mil_model_init(s.model, 5);
            mil_model_set_metadata(s.model, "note", NULL);
            memset(s.out, 0, sizeof s.out);
            const size_t held = mem.bytes;
            mem.fail_at = mem.calls + n;
            mem.fail_after = after;
            const mil_status status = call(ctx, &s);
            mem.fail_at = -1;
            if (status == MIL_OK) CHECK(memcmp(s.out, reference.out, sizeof s.out) == 0);      // it went without that memory
            else if (!CHECK(status == MIL_ERROR_NO_MEMORY && mil_error(ctx)[0] && mem.bytes == held))
                printf("  %s, allocation %ld%s: %s %s, %ld bytes more\n", name, n, after ? " on" : "", mil_status_name(status), mil_error(ctx), (long)(mem.bytes - held));
            subject now;
            memset(&now, 0, sizeof now);
            if (status != MIL_OK) {                        // weights and texts are as before
                describe(&now, s.model, ctx);
                if (!CHECK(memcmp(now.out, before, 200 * sizeof *before) == 0)) printf("  %s, allocation %ld: half-changed\n", name, n);
            }
        }
    }
    memset(s.out, 0, sizeof s.out);
    mil_model_init(s.model, 5);
    mil_model_set_metadata(s.model, "note", NULL);
    CHECK(call(ctx, &s) == MIL_OK && memcmp(s.out, reference.out, sizeof s.out) == 0);
    mil_model_free(s.model);
    free(s.bytes);
    mil_context_free(ctx);
    CHECK(mem.bytes == 0);
}

#define EACH(name) TEST(allocations_of_##name) { each_allocation(#name, call_##name); }
EACH(create) EACH(open_memory) EACH(open) EACH(load_memory) EACH(load) EACH(save_memory) EACH(save) EACH(names) EACH(metadata)
EACH(score) EACH(masked) EACH(train_state) EACH(metrics) EACH(bootstrap) EACH(rank)

TEST(allocations_of_a_context)
{
    for (int after = 0; after < 2; after++) {
        int failed = 0;
        for (long n = 0; n < 10; n++) {
            mil_context *ctx = (mil_context *)&mem;
            mil_context_options o = mil_context_options_default();
            memset(&mem, 0, sizeof mem);
            mem.fail_at = n;
            mem.fail_after = after;
            o.allocator.reallocate = memory_reallocate;
            o.allocator.user = &mem;
            o.threads = 2;
            const mil_status status = mil_context_create(&ctx, &o);
            CHECK(status == MIL_OK || (status == MIL_ERROR_NO_MEMORY && ctx == NULL && mem.bytes == 0));
            failed += status != MIL_OK;
            mil_context_free(ctx);
            CHECK(mem.bytes == 0);
        }
        CHECK(failed >= 1 && failed < 10);
    }
}

// Every architecture: each allocation of making it may fail.
TEST(allocations_of_each_model)
{
    mil_context *ctx = memory_context(&mem, 1, NULL);
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *a = mil_architecture_at(i);
        char name[128];
        snprintf(name, sizeof name, "%s.%s", a->name, a->configs[0].name);
        const char *options = "in_dim=16";
        long calls = mem.calls;
        mil_model *m = mil_create(ctx, name, options);
        if (!CHECK(m != NULL)) { printf("  %s: %s\n", name, mil_error(ctx)); continue; }
        mil_model_free(m);
        calls = mem.calls - calls;
        const size_t held = mem.bytes;
        for (long n = 0; n < calls; n += 1 + calls / 8) {  // a model of standard width takes a while: a sample
            mem.fail_at = mem.calls + n;
            CHECK(mil_create(ctx, name, options) == NULL && mil_error_status(ctx) == MIL_ERROR_NO_MEMORY && mem.bytes == held);
            mem.fail_at = -1;
        }
    }
    mil_context_free(ctx);
    CHECK(mem.bytes == 0);
}

// ---- scoring, streaming and training with each model, narrow: wide layers only take longer ----
enum { ROWS = 16, COLUMNS = 16 };         // of the bag

typedef mil_status model_call(mil_model *m, const mil_bag *bag, double out[2]);

static mil_status score_model(mil_model *m, const mil_bag *bag, double out[2])
{
    mil_scorer *s = mil_scorer_create(m, NULL);
    mil_status status = s ? mil_scorer_score(s, bag) : mil_error_status(mil_model_context(m));
    if (status == MIL_OK) status = mil_scorer_read_f64(s, MIL_LOGITS, out, mil_model_num_classes(m));
    mil_scorer_free(s);
    return status;
}

static mil_status stream_model(mil_model *m, const mil_bag *bag, double out[2])
{
    const float *x = (const float *)bag->features.data;
    mil_scorer *s = mil_scorer_create(m, NULL);
    mil_status status = s ? MIL_OK : mil_error_status(mil_model_context(m));
    for (int row = 0, rows = 3; status == MIL_OK && row < ROWS; row += rows, rows = rows < ROWS - row ? rows : ROWS - row)
        status = mil_scorer_push(s, x + row * COLUMNS, rows, COLUMNS * sizeof *x, MIL_F32);
    if (status == MIL_OK) status = mil_scorer_read_f64(s, MIL_LOGITS, out, mil_model_num_classes(m));
    mil_scorer_free(s);
    return status;
}

#ifndef MIL_NO_TRAINING
static mil_status train_model(mil_model *m, const mil_bag *bag, double out[2])
{
    const mil_target target = mil_model_num_classes(m) == 1 ? mil_target_value(1) : mil_target_class(1);
    mil_trainer *t = mil_trainer_create(m, "optimizer=adamw lr=0.01 seed=7");
    const mil_status status = t ? mil_trainer_step(t, bag, &target, &out[0], NULL) : mil_error_status(mil_model_context(m));
    out[1] = t ? mil_trainer_grad_norm(t) : 0;
    mil_trainer_free(t);
    return status;
}
#endif

// How far apart the allocations are that are made to fail, and the first: all of them where they are few, or with
// MIL_TEST_ALL in the environment (make failures), else a sample, another one each time.
enum { FEW = 100 };
static long stride_of(long calls, long *first)
{
    static long round;
    const long stride = getenv("MIL_TEST_ALL") ? 1 : 1 + calls / (check_small() ? FEW / 10 : FEW);
    *first = round++ % stride;
    return stride;
}

// The allocations of the call, each failing in turn: no memory, nothing leaked, no weight changed; or the answer as ever.
static void each_allocation_of_model(mil_context *ctx, const char *name, const char *options, model_call *call, int masked, const char *what)
{
    static mil_real before[NARROW_WEIGHTS], after[NARROW_WEIGHTS];
    float x[ROWS * COLUMNS];
    uint64_t state = 3;
    for (int i = 0; i < ROWS * COLUMNS; i++) x[i] = (float)memory_noise(&state);
    const unsigned char mask[ROWS] = { 1, 1, 0, 1, 0, 1, 1 };
    const int64_t rows = ROWS;
    mil_bag bag = mil_bag_make(x, ROWS, COLUMNS);
    if (masked) bag.mask = mil_tensor_make(mask, MIL_BOOL, 1, &rows);
    mil_model *m = mil_create(ctx, name, options);
    double first[2] = { 0, 0 }, again[2] = { 0, 0 };
    long calls = mem.calls, refused = 0;
    if (!CHECK(m && call(m, &bag, first) == MIL_OK)) printf("  %s %s, %s: %s\n", name, options, what, mil_error(ctx));
    calls = mem.calls - calls;
    for (int forever = 0; m && forever < 2; forever++) {
        long n;
        const long stride = stride_of(calls, &n);
        for (; n < calls; n += stride) {
            mil_model_init(m, 0);
            const int64_t count = narrow_weights(m, before);
            const size_t held = mem.bytes;
            double got[2] = { 0, 0 };
            mem.fail_at = mem.calls + n;
            mem.fail_after = forever;
            const mil_status status = call(m, &bag, got);
            mem.fail_at = -1;
            refused += status != MIL_OK;
            if (status == MIL_OK) CHECK(got[0] == first[0] && got[1] == first[1]);                 // it went without that memory
            else if (!CHECK(status == MIL_ERROR_NO_MEMORY && mil_error(ctx)[0] && mem.bytes == held &&
                            narrow_weights(m, after) == count && memcmp(before, after, (size_t)count * sizeof *before) == 0))
                printf("  %s %s, %s, allocation %ld%s: %s %s, %ld bytes more\n", name, options, what, n, forever ? " on" : "",
                       mil_status_name(status), mil_error(ctx), (long)(mem.bytes - held));
        }
    }
    CHECK(refused > 0);
    if (m) mil_model_init(m, 0);
    CHECK(m && call(m, &bag, again) == MIL_OK && again[0] == first[0] && again[1] == first[1]);
    mil_model_free(m);
}

static void each_allocation_of_using(mil_context *ctx, const char *name, const char *options)
{
    mil_model *m = mil_create(ctx, name, options);
    mil_scorer *s = m ? mil_scorer_create(m, NULL) : NULL;
    float x[COLUMNS] = { 0 };
    const int streams = s && mil_scorer_push(s, x, 1, sizeof x, MIL_F32) == MIL_OK;
    const int masks = m && (mil_model_architecture(m)->flags & MIL_MODEL_MASK);
    mil_scorer_free(s);
    mil_model_free(m);
    if (streams) each_allocation_of_model(ctx, name, options, stream_model, 0, "streaming");
    for (int masked = 0; masked <= masks; masked++) {
        each_allocation_of_model(ctx, name, options, score_model, masked, "scoring");
#ifndef MIL_NO_TRAINING
        each_allocation_of_model(ctx, name, options, train_model, masked, "training");
#endif
    }
}

// Each architecture with each of its switches and choices turned by itself, then what works only together.
TEST(allocations_of_using_each_model)
{
    static const char *const together[][2] = {
        { "rrt", "apply_attn=true attn=rrt" }, { "rrt", "apply_attn=true attn=rrt epeg=false ffn=true" }, { "rrt", "apply_pos=true pos=ppeg" },
        { "rrt", "apply_pos=true pos=peg pos_pos=0 multi_scale=true" }
    };
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *a = mil_architecture_at(i);
        mil_context *ctx = memory_context(&mem, 1, NULL);
        char name[128], narrow[1024], options[1280];
        narrow_options(a, COLUMNS, narrow, sizeof narrow);
        for (int c = 0; c < a->config_count; c++) {
            snprintf(name, sizeof name, "%s.%s", a->name, a->configs[c].name);
            each_allocation_of_using(ctx, name, narrow);
        }
        snprintf(name, sizeof name, "%s.%s", a->name, a->configs[0].name);
        for (int k = 0; k < a->option_count; k++) {
            const mil_option *o = &a->options[k];
            const char *choice = o->type == MIL_OPTION_BOOL ? "true|false" : o->type == MIL_OPTION_CHOICE ? o->choices : "";
            while (*choice) {
                const int length = (int)strcspn(choice, "|");
                snprintf(options, sizeof options, "%s %s=%.*s", narrow, o->name, length, choice);
                if ((int)strlen(o->value) != length || strncmp(o->value, choice, (size_t)length)) each_allocation_of_using(ctx, name, options);
                choice += length + (choice[length] == '|');
            }
        }
        for (size_t k = 0; k < sizeof together / sizeof *together; k++) {
            if (strcmp(together[k][0], a->name)) continue;
            snprintf(options, sizeof options, "%s %s", narrow, together[k][1]);
            each_allocation_of_using(ctx, name, options);
        }
        mil_context_free(ctx);
        CHECK(mem.bytes == 0);
    }
}

// ---- a model that records every op and every layer there is ----
typedef struct { int64_t in_dim, num_classes; } every_config;
typedef struct {
    mil_param *token, *mean, *filter, *tap, *map;
    mil_linear_layer linear, head;
    mil_norm_layer norm;
    mil_patch_mlp patch;
    mil_attention_scorer plain, gated, pool;
    mil_mlp mlp;
    mil_mha_layer mha;
    mil_nystrom_layer nystrom, biased;
    mil_ppeg_layer ppeg;
    mil_region_attention region;
} every_layers;

static void every_declare(mil_builder *b, void *layers, const void *config)
{
    every_layers *m = (every_layers *)layers;
    const int64_t E = COLUMNS, classes = ((const every_config *)config)->num_classes, kernels[2] = { 3, 1 };
    const int64_t token[3] = { 1, 1, E }, filter[4] = { E, 1, 3, 3 }, tap[3] = { E, 1, 3 }, map[3] = { 2, 1, 3 };
    const mil_init small = { MIL_INIT_UNIFORM, 0.1 }, zero = { MIL_INIT_CONSTANT, 0 };
    mil_int_list sizes = { 2, { 12, 8 } };
    mil_text_list activations = { 2, { "relu", "tanh" } };
    mil_nystrom_options o = mil_nystrom_options_default(E, 2, 4, 3);
    m->token = mil_declare(b, small, 3, token, "token");
    m->mean = mil_declare_buffer(b, MIL_REAL_DTYPE, zero, 1, &E, "mean");
    m->filter = mil_declare(b, small, 4, filter, "filter");
    m->tap = mil_declare(b, small, 3, tap, "tap");
    m->map = mil_declare(b, small, 3, map, "map");
    mil_declare_push(b, "layers");
    m->linear = mil_declare_linear(b, E, E, 1, MIL_LINEAR_TORCH, "linear");
    m->norm = mil_declare_layer_norm(b, E, 1e-5, "norm");
    m->patch = mil_declare_patch_mlp(b, E, E, 2, 0.25, "patch");
    m->plain = mil_declare_attention_scorer(b, E, 4, 1, 0, 0.25, "plain");
    m->gated = mil_declare_attention_scorer(b, E, 4, 2, 1, 0.25, "gated");
    m->pool = mil_declare_attention_pool(b, E, 4, MIL_ACT_GELU, 1, "pool");
    mil_declare_mlp(b, E, &sizes, &activations, &m->mlp, "mlp");
    m->mha = mil_declare_mha(b, E, 2, 0.1, MIL_LINEAR_XAVIER, "mha");
    m->nystrom = mil_declare_nystrom(b, &o, "nystrom");
    o.qkv_bias = 1;
    o.per_matrix = 1;
    m->biased = mil_declare_nystrom(b, &o, "biased");
    m->ppeg = mil_declare_ppeg(b, E, kernels, 2, MIL_LINEAR_TORCH, "ppeg");
    m->region = mil_declare_region_attention(b, E, 2, 4, 1, 3, 0.1, MIL_LINEAR_TORCH, "region");
    mil_declare_pop(b);
    m->head = mil_declare_linear(b, E, classes, 1, MIL_LINEAR_TORCH, "classifier");
    mil_declare_alias(b, m->head.weight, "head");
}

// The sum of all elements, squared and small, so that every op has a gradient that counts.
static void count_in(mil_node **sum, mil_node *x)
{
    x = mil_affine(mil_sum_all(mil_square(mil_affine(x, 1, 0.5))), 1e-3, 0);
    *sum = *sum ? mil_add(*sum, x) : x;
}

static void every_forward(const void *layers, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const every_layers *m = (const every_layers *)layers;
    mil_tape *tape = in->tape;
    const int64_t E = COLUMNS, N = in->features->shape[1], before = (4 - N % 4) % 4;
    const int64_t column[3] = { 1, N, 1 }, full[3] = { 1, N, E }, flat[2] = { N, E }, grid[4] = { 1, N, 1, E }, one[2] = { 1, 1 }, row[3] = { 1, 1, E };
    const int axes[3] = { 0, 2, 1 };
    int64_t side = 3;                                      // of a square of at least N tokens
    while (side * side < N) side += 3;
    mil_node *x = mil_linear_forward(&m->linear, in->features), *sum = NULL, *attention = NULL;
    mil_node *positive = mil_affine(mil_sigmoid(x), 1, 0.1), *token = mil_use(tape, m->token);
#define UNARY(name, text) count_in(&sum, mil_##name(positive));
    MIL_UNARY_LIST(UNARY)
#undef UNARY
    for (int act = 0; act < MIL_ACT_COUNT; act++) count_in(&sum, mil_activate(x, (mil_activation)act));
    mil_node *two[2] = { x, positive };
    count_in(&sum, mil_leaky_relu(x, 0.2));
    count_in(&sum, mil_clamp(x, -0.5, 0.5));
    count_in(&sum, mil_sub(x, token));
    count_in(&sum, mil_div(x, positive));
    count_in(&sum, mil_maximum(x, token));
    count_in(&sum, mil_minimum(x, token));
    mil_node *mask = mil_slice(mil_one_hot(mil_random_permutation(tape, "order", N), N), 1, 0, 1);         // [N, 1], one of them
    mask = mil_reshape(mil_affine(mask, -1, 1), 3, column);                                                // all but one
    count_in(&sum, mil_mask_fill(x, mask, 0.25));
    count_in(&sum, mil_permute(x, axes));
    count_in(&sum, mil_transpose(x));
    count_in(&sum, mil_concat(two, 2, 1));
    count_in(&sum, mil_slice(x, 1, 2, 5));
    count_in(&sum, mil_pad(x, 1, 1, 2));
    count_in(&sum, mil_broadcast(token, 3, full));
    count_in(&sum, mil_sum_to(x, 3, row));
    count_in(&sum, mil_detach(x));
    count_in(&sum, mil_sum(x, 1));
    count_in(&sum, mil_mean(x, -1));
    count_in(&sum, mil_max(x, 1));
    count_in(&sum, mil_min(x, -1));
    count_in(&sum, mil_logsumexp(x, 1));
    count_in(&sum, mil_one_hot(mil_argmax(x, 1), N));
    count_in(&sum, mil_softmax(x, 1));
    count_in(&sum, mil_softmax(x, -1));
    count_in(&sum, mil_log_softmax(x, -1));
    count_in(&sum, mil_matmul(x, mil_transpose(positive)));
    count_in(&sum, mil_matmul_t(x, positive, 1, 0));
    count_in(&sum, mil_linear(x, mil_use(tape, m->linear.weight), NULL));
    count_in(&sum, mil_layer_norm(x, NULL, NULL, 1e-5));
    mil_node *index = mil_squeeze(mil_squeeze(mil_topk(mil_sum(x, -1), 3, 1, 1), 0), 1);                   // [3]
    count_in(&sum, mil_gather(x, index, 1));
    count_in(&sum, mil_scatter_add(mil_gather(x, index, 1), index, 1, N));
    count_in(&sum, mil_one_hot(mil_argsort(mil_slice(x, -1, 0, 1), 1, 1), N));
    count_in(&sum, mil_gather_rows(x, mil_nearest(x, positive, 2)));
    count_in(&sum, mil_mul(x, mil_random_uniform(tape, "uniform", 3, full)));
    count_in(&sum, mil_mul(x, mil_random_normal(tape, "normal", 3, full)));
    count_in(&sum, mil_dropout(x, 0.5, "drop"));
    count_in(&sum, mil_drop_path(x, 0.5, "path"));
    mil_node *narrow = mil_slice(x, 1, 0, 3);
    count_in(&sum, mil_attention(x, positive, x, 2, 0, mil_squeeze(mask, 2), 0.1, "attention"));           // queries stream
    count_in(&sum, mil_attention(narrow, positive, x, 2, 0, NULL, 0, NULL));                               // keys stream
    count_in(&sum, mil_run_mean(x, 4, before));
    mil_node *square = mil_affine(mil_matmul_t(narrow, narrow, 0, 1), 0.1, 0);
    count_in(&sum, mil_pseudo_inverse(mil_softmax(mil_identity_minus(square, 2), -1), 2, 0));
    count_in(&sum, mil_conv_grid(mil_reshape(x, 4, grid), mil_use(tape, m->filter), NULL));
    count_in(&sum, mil_conv_tokens(x, mil_use(tape, m->filter), NULL, 1, N - 1));
    count_in(&sum, mil_conv_rows(x, mil_use(tape, m->tap), NULL, 2));
    const int64_t maps[4] = { 1, 2, N, E / 2 };
    count_in(&sum, mil_conv_maps(mil_reshape(x, 4, maps), mil_use(tape, m->map), NULL, 1));
#ifndef MIL_NO_TRAINING
    mil_node *none = mil_argsort(mil_slice(mil_reshape(x, 2, flat), 1, 0, 1), 1, 0);                       // [N, 1] of zeros
    count_in(&sum, mil_smooth_svm(mil_reshape(x, 2, flat), mil_squeeze(none, 1), 1, 1));
    count_in(&sum, mil_cross_entropy(mil_reshape(x, 2, flat), mil_squeeze(none, 1), NULL, 0.1));
    count_in(&sum, mil_bce_with_logits(x, mil_detach(mil_sigmoid(positive)), 2));
#endif

    count_in(&sum, mil_layer_norm_forward(&m->norm, x));
    count_in(&sum, mil_patch_mlp_forward(&m->patch, x));
    count_in(&sum, mil_attention_scores(&m->gated, x));
    count_in(&sum, mil_attention_scores(&m->pool, x));
    count_in(&sum, mil_mlp_forward(&m->mlp, x));
    count_in(&sum, mil_mha_forward(&m->mha, x, x, x, mil_squeeze(mask, 2), &attention));
    mil_nystrom_parts parts;
    count_in(&sum, mil_nystrom_forward(&m->nystrom, x, NULL, -1, &parts));
    mil_output(out, "nystrom", mil_nystrom_weights(&m->nystrom, &parts, 1));
    count_in(&sum, mil_nystrom_forward(&m->nystrom, x, NULL, 2, NULL));
    count_in(&sum, mil_nystrom_forward(&m->biased, x, mil_squeeze(mask, 2), -1, NULL));
    count_in(&sum, mil_nystrom_forward(&m->biased, x, NULL, 1, NULL));
    count_in(&sum, mil_ppeg_forward(&m->ppeg, x, 1, N - 1));
    mil_node *regions = mil_regions_split(x, side, 3);
    count_in(&sum, mil_regions_join(mil_region_attention_forward(&m->region, regions), 1, side, 3, N));
    if (mil_tape_is_training(tape)) mil_update(m->mean, mil_reshape(mil_mean(x, 1), 1, &E));

    mil_node *a = mil_attention_scores(&m->plain, x);                                                      // [1, N, 1]
    out->attention = mil_attention_weights(attention, 0, N);
    out->attention_weights = mil_softmax(a, 1);
    out->slide_feats = mil_squeeze(mil_softmax_pool(a, x), 1);
    out->logits = mil_add(mil_linear_forward(&m->head, out->slide_feats), mil_reshape(sum, 2, one));
#ifndef MIL_NO_TRAINING
    if (in->target) out->loss = mil_add(mil_loss_node(out->logits, in->target), sum);
#endif
    (void)config;
}

TEST(allocations_of_every_op_and_layer)
{
    static const mil_option options[] = {
        { "in_dim", MIL_OPTION_INT, offsetof(every_config, in_dim), "16", NULL, "columns" },
        { "num_classes", MIL_OPTION_INT, offsetof(every_config, num_classes), "2", NULL, "classes" }
    };
    static const mil_config configs[] = { { "base", "" } };
    static const mil_architecture every = {
        "every", "every op", "", "", options, 2, sizeof(every_config), configs, 1, sizeof(every_layers), "classifier", 0, every_declare, every_forward
    };
    mil_context *ctx = memory_context(&mem, 1, NULL);
    CHECK(mil_register(ctx, &every) == MIL_OK);
    each_allocation_of_using(ctx, "every", "in_dim=16");
    mil_context_free(ctx);
    CHECK(mem.bytes == 0);
}

// A limit on the size of files stands for a full disk: writes come back short, then fail.
TEST(a_full_disk_leaves_the_old_file)
{
    mil_context *ctx = memory_context(&mem, 1, NULL);
    mil_model *model = mil_create(ctx, "abmil", SMALL);
    struct rlimit old, small;
    mil_real first[6], second[6];
    if (!CHECK(model && mil_save(model, path) == MIL_OK)) return;
    mil_param *p = mil_model_find(model, "classifier.weight");
    CHECK(p && mil_param_read(p, first, 6) == MIL_OK);
    CHECK(mil_model_init(model, 9) == MIL_OK);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    for (rlim_t limit = 0; limit < 900; limit += 37) {
        small = old;
        small.rlim_cur = limit;
        setrlimit(RLIMIT_FSIZE, &small);
        const mil_status status = mil_save(model, path);
        setrlimit(RLIMIT_FSIZE, &old);
        CHECK(status == MIL_ERROR_IO);
        CHECK_CONTAINS(mil_error(ctx), path);
    }
    mil_model *again = mil_open(ctx, path);                // the file of before, whole
    p = again ? mil_model_find(again, "classifier.weight") : NULL;
    CHECK(p && mil_param_read(p, second, 6) == MIL_OK && memcmp(first, second, sizeof first) == 0);
    mil_model_free(again);
    CHECK(mil_save(model, path) == MIL_OK);
    mil_model_free(model);
    mil_context_free(ctx);
    CHECK(mem.bytes == 0);
}

#define LIST T(allocations_of_create) T(allocations_of_open_memory) T(allocations_of_open) T(allocations_of_load_memory) \
    T(allocations_of_load) T(allocations_of_save_memory) T(allocations_of_save) T(allocations_of_names) T(allocations_of_metadata) \
    T(allocations_of_score) T(allocations_of_masked) T(allocations_of_train_state) T(allocations_of_metrics) \
    T(allocations_of_bootstrap) T(allocations_of_rank) T(allocations_of_a_context) T(allocations_of_each_model) \
    T(allocations_of_using_each_model) T(allocations_of_every_op_and_layer) \
    T(a_full_disk_leaves_the_old_file)

int main(int argc, char **argv)
{
    static const check_test tests[] = { LIST };
    char file[256];
    (void)memory_noise;
    snprintf(file, sizeof file, "%s/mil_test_failures_%ld.safetensors", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", (long)getpid());
    path = file;
    const int result = check_main(tests, (int)(sizeof tests / sizeof *tests), argc, argv);
    remove(file);
    return result;
}
