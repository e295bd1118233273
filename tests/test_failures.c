// build: float double
// Every public call that can allocate, with each of its allocations failing in turn, once and for good: an error and its
// sentence, nothing leaked, nothing half-changed, and the same call works right after. Tapes, scorers, trainers and files
// have the same loop in their own tests; here are models, their files, metrics and contexts. Then a disk that is full.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>
#include "mil.h"
#include "check.h"
#include "memory.h"

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
