// build: float
// Calls in any order: a model, two scorers and a trainer are created, used, changed, saved, restored and freed as chance has it, with
// bags that fit and bags that do not, and allocations that fail. Each answer is a code and a sentence that agree, a call that failed
// has changed no weight, results that can be read are what a fresh model gives, and nothing is left behind.
// MIL_TEST_ROUNDS in the environment sets the number of lives per model.
#include "mil.h"
#include "check.h"
#include "memory.h"
#include "narrow.h"

enum { D = 8, MOST = 24, CALLS = 60 };

typedef struct world {
    memory       mem;
    mil_context *ctx;
    mil_model   *model;
    mil_scorer  *scorer[2];
    mil_trainer *trainer;
    void        *weights, *state;                          // saved, or NULL
    size_t       weights_size, state_size;
    uint64_t     chance;
    char         said[160];                                // the call, for a message
} world;

static float features[MOST * (D + 2)], coords[MOST * 2];
static unsigned char mask[MOST];
static mil_real before[NARROW_WEIGHTS], after[NARROW_WEIGHTS];

static int chance(world *w, int n) { return memory_chance(&w->chance, n); }

// A bag of 1 to MOST instances; now and then one that is wrong. *bad: it may not be taken (what a mask hides may be NaN).
static mil_bag some_bag(world *w, int *bad)
{
    const int n = 1 + chance(w, MOST), width = chance(w, 12) ? D : D + 1;
    *bad = width != D;
    for (int i = 0; i < n * width; i++) features[i] = (float)memory_noise(&w->chance);
    mil_bag bag = mil_bag_make(features, n, width);
    if (!chance(w, 10)) {
        features[chance(w, n * width)] = (float)(chance(w, 2) ? NAN : -INFINITY);
        *bad = 1;
    }
    if (!chance(w, 4)) {
        const int64_t shape[2] = { n, 2 };
        for (int i = 0; i < 2 * n; i++) coords[i] = (float)(256 * chance(w, 50));
        bag.coords = mil_tensor_make(coords, MIL_F32, 2, shape);
    }
    if (!chance(w, 4)) {
        const int64_t rows = n - !chance(w, 8);            // a mask too short
        for (int i = 0; i < n; i++) mask[i] = (unsigned char)(chance(w, 4) > 0);
        bag.mask = mil_tensor_make(mask, MIL_BOOL, 1, &rows);
        *bad = width != D || rows != n;
    }
    return bag;
}

// Code and sentence agree.
static void answered(world *w, mil_status status, const char *call)
{
    if (!CHECK((status == MIL_OK) == (mil_error(w->ctx)[0] == 0) && mil_error_status(w->ctx) == status))
        printf("  %s%s: %s, but %s: %s\n", w->said, call, mil_status_name(status), mil_status_name(mil_error_status(w->ctx)), mil_error(w->ctx));
}

static mil_status created(world *w, const void *object) { return object ? MIL_OK : mil_error_status(w->ctx); }

static void save(world *w, int of_trainer)
{
    size_t size = 0;
    mil_status status = of_trainer ? mil_trainer_save(w->trainer, NULL, &size) : mil_save_memory(w->model, NULL, &size);
    answered(w, status, "size");
    if (status != MIL_OK) return;
    void *bytes = malloc(size);
    const size_t room = size;
    status = of_trainer ? mil_trainer_save(w->trainer, bytes, &size) : mil_save_memory(w->model, bytes, &size);
    answered(w, status, "save");
    if (!CHECK(size == room || status != MIL_OK) || status != MIL_OK) { free(bytes); return; }
    void **kept = of_trainer ? &w->state : &w->weights;
    free(*kept);
    *kept = bytes;
    *(of_trainer ? &w->state_size : &w->weights_size) = size;
}

static void use_scorer(world *w, int i)
{
    mil_scorer *s = w->scorer[i];
    int bad = 0;
    if (!s) {
        mil_scorer_options o = mil_scorer_options_default();
        o.capacity = chance(w, 3) ? 0 : chance(w, MOST);
        o.results = (unsigned)chance(w, 1 << MIL_RESULT_COUNT);
        w->scorer[i] = mil_scorer_create(w->model, chance(w, 3) ? &o : NULL);
        answered(w, created(w, w->scorer[i]), "scorer");
        return;
    }
    switch (chance(w, 9)) {
    case 0:
        mil_scorer_free(s);
        w->scorer[i] = NULL;
        return;
    case 1:
        mil_scorer_reset(s);
        CHECK(mil_scorer_instances(s) == 0);
        return;
    case 2: case 3: case 4: {
        const int64_t had = mil_scorer_instances(s);
        mil_bag bag = some_bag(w, &bad);
        const int n = (int)bag.features.shape[0] % 9, pad = chance(w, 3);
        bad = 0;
        for (int r = 0; r < n; r++) for (int c = 0; c < D; c++) bad |= !isfinite(features[r * (D + pad) + c]);
        const mil_status status = mil_scorer_push(s, features, n, (size_t)(D + pad) * sizeof *features, MIL_F32);
        answered(w, status, "push");
        CHECK(status != MIL_OK || !bad);
        CHECK(status != MIL_OK || n == 0 || mil_scorer_instances(s) == had + n || mil_scorer_instances(s) == n);   // n: a new bag
        return;
    }
    case 5: case 6: {
        mil_bag bag = some_bag(w, &bad);
        const mil_status status = mil_scorer_score(s, &bag);
        answered(w, status, "score");
        CHECK(status != MIL_OK || mil_scorer_instances(s) == bag.features.shape[0]);
        return;
    }
    default: {
        static double values[MOST * 128 * 64];
        const mil_result result = (mil_result)chance(w, MIL_RESULT_COUNT);
        const int64_t count = mil_scorer_count(s, result);
        if (!CHECK(count >= 0 && count <= (int64_t)(sizeof values / sizeof *values))) return;
        const mil_status status = mil_scorer_read_f64(s, result, values, count);
        answered(w, status, "read");
        CHECK(status != MIL_OK || count > 0);
        if (status == MIL_OK && result == MIL_LOGITS) for (int64_t k = 0; k < count; k++) CHECK(isfinite(values[k]));
        if (status == MIL_OK && (result == MIL_PROBABILITIES || result == MIL_RANK)) for (int64_t k = 0; k < count; k++) CHECK(values[k] >= 0 && values[k] <= 1);
    } }
}

static void use_trainer(world *w)
{
    static const char *const options[] = {
        "", "optimizer=sgd momentum=0.9 accumulate=2", "optimizer=adam lookahead=true lookahead_k=2 ema=0.5", "optimizer=radam ema=0.9 clip_norm=1 accumulate=3",
        "lr=0.01 schedule=cosine steps=9 warmup=2 ema=0.9 ema_warmup=true", "optimizer=none", "accumulate=0"
    };
    int bad = 0;
    double loss = 0;
    if (!w->trainer) {
        w->trainer = mil_trainer_create(w->model, options[chance(w, 7)]);
        answered(w, created(w, w->trainer), "trainer");
        return;
    }
    const int64_t count = narrow_weights(w->model, before);
    mil_status status = MIL_OK;
    const int what = chance(w, 12);
    if (what < 6) {
        mil_bag bag = some_bag(w, &bad);
        mil_target target = mil_target_class(chance(w, 3));
        if (mil_model_num_classes(w->model) == 1 || !chance(w, 8)) target = mil_target_value(chance(w, 2));
        if (!chance(w, 12)) target.weight = (double)NAN;
        status = what < 5 ? mil_trainer_step(w->trainer, &bag, &target, &loss, NULL) : mil_trainer_evaluate(w->trainer, &bag, &target, &loss, NULL);
        answered(w, status, "step");
        CHECK(status != MIL_OK || (!bad && isfinite(loss)));
    } else if (what == 6) answered(w, status = mil_trainer_flush(w->trainer), "flush");
    else if (what == 7) answered(w, status = mil_trainer_swap_ema(w->trainer), "swap");
    else if (what == 8) save(w, 1);
    else if (what < 11 && w->state) {
        const int64_t steps = mil_trainer_steps(w->trainer);
        char *bytes = (char *)malloc(w->state_size);
        memcpy(bytes, w->state, w->state_size);
        if (!chance(w, 3)) bytes[chance(w, (int)w->state_size)] ^= (char)(1 << chance(w, 7));
        status = mil_trainer_restore(w->trainer, bytes, w->state_size);
        answered(w, status, "restore");
        CHECK(status == MIL_OK || mil_trainer_steps(w->trainer) == steps);
        free(bytes);
        if (status == MIL_OK) return;
    } else if (what == 11) {
        mil_trainer_free(w->trainer);
        w->trainer = NULL;
        return;                                            // averaged weights that were swapped in go back
    }
    if (status != MIL_OK && what != 5) {
        CHECK(narrow_weights(w->model, after) == count);
        if (!CHECK(memcmp(before, after, (size_t)count * sizeof *before) == 0)) printf("  %s: trainer's call %d failed (%s) and changed weights\n", w->said, what, mil_error(w->ctx));
    }
}

static void use_model(world *w)
{
    static const char *const names[] = { "normal", "tumor" };
    const int64_t count = narrow_weights(w->model, before);
    mil_status status = MIL_OK;
    const int what = chance(w, 7);
    switch (what) {
    case 0: save(w, 0); break;
    case 1: case 2:
        if (!w->weights) break;
        if (what == 2) ((char *)w->weights)[chance(w, (int)w->weights_size)] ^= (char)(1 << chance(w, 7));     // one bit is wrong
        answered(w, status = mil_load_memory(w->model, w->weights, w->weights_size, NULL), "load");
        break;
    case 3: answered(w, status = mil_model_init(w->model, (uint64_t)chance(w, 3)), "init"); break;
    case 4: answered(w, status = mil_model_set_metadata(w->model, chance(w, 4) ? "note" : "mil.config", chance(w, 3) ? "text" : NULL), "metadata"); break;
    case 5: answered(w, status = mil_model_set_class_names(w->model, names, 1 + chance(w, 2)), "names"); break;
    default:
        if (w->weights) {
            mil_model *again = mil_open_memory(w->ctx, w->weights, w->weights_size);
            answered(w, created(w, again), "open");
            mil_model_free(again);
        }
    }
    if (status != MIL_OK) {
        CHECK(narrow_weights(w->model, after) == count);
        CHECK(memcmp(before, after, (size_t)count * sizeof *before) == 0);
    }
}

// What the model that has seen all this says of a bag, and what a fresh one with its weights says.
static void compare_with_a_fresh_model(world *w)
{
    int bad;
    double y[2][2] = { { 0, 0 }, { 0, 0 } };
    const int64_t classes = mil_model_num_classes(w->model);
    mil_status status[2];
    mil_bag bag = some_bag(w, &bad);
    free(w->weights);
    w->weights = NULL;
    save(w, 0);
    if (!CHECK(w->weights != NULL)) return;
    mil_context *ctx = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK);
    mil_model *fresh = mil_open_memory(ctx, w->weights, w->weights_size);
    if (fresh == NULL) CHECK_CONTAINS(mil_error(ctx), "holds NaN or infinity");        // a bit of a weight was wrong
    for (int k = 0; fresh && k < 2; k++) {
        mil_scorer *s = k ? mil_scorer_create(fresh, NULL) : w->scorer[0] ? w->scorer[0] : mil_scorer_create(w->model, NULL);
        status[k] = s ? mil_scorer_score(s, &bag) : MIL_ERROR_STATE;
        if (status[k] == MIL_OK) status[k] = mil_scorer_read_f64(s, MIL_LOGITS, y[k], classes);
        if (s != w->scorer[0]) mil_scorer_free(s);
    }
    if (fresh && !CHECK(status[0] == status[1] && memcmp(y[0], y[1], sizeof y[0]) == 0))
        printf("  %s: %s %g %g, a fresh model %s %g %g\n", w->said, mil_status_name(status[0]), y[0][0], y[0][1], mil_status_name(status[1]), y[1][0], y[1][1]);
    mil_model_free(fresh);
    mil_context_free(ctx);
}

static void live(const mil_architecture *a, int config, uint64_t seed)
{
    static world w;
    char name[128], options[1024];
    memset(&w, 0, sizeof w);
    w.chance = seed * 2 + 1;
    chance(&w, 2);
    w.ctx = memory_context(&w.mem, 1 + chance(&w, 2), NULL);
    snprintf(name, sizeof name, "%s.%s", a->name, a->configs[config].name);
    narrow_options(a, D, options, sizeof options);
    w.model = mil_create(w.ctx, name, options);
    if (!CHECK(w.model != NULL)) return;
    for (int call = 0; call < CALLS; call++) {
        snprintf(w.said, sizeof w.said, "%s, seed %llu, call %d: ", name, (unsigned long long)seed, call);
        if (!chance(&w, 5)) {
            w.mem.fail_at = w.mem.calls + chance(&w, 8);
            w.mem.fail_after = chance(&w, 2);
        }
        const int which = chance(&w, 8), failures = check_failures;
        if (which < 4) use_scorer(&w, which & 1);
        else if (which < 7) use_trainer(&w);
        else use_model(&w);
        w.mem.fail_at = -1;
        if (check_failures > failures) printf("  %s see above\n", w.said);
    }
    compare_with_a_fresh_model(&w);
    mil_trainer_free(w.trainer);
    for (int i = 0; i < 2; i++) mil_scorer_free(w.scorer[i]);
    mil_model_free(w.model);
    mil_context_free(w.ctx);
    if (!CHECK(w.mem.bytes == 0)) printf("  %s: %ld bytes are left\n", w.said, (long)w.mem.bytes);
    free(w.weights);
    free(w.state);
}

TEST(calls_in_any_order_do_no_harm)
{
    const int rounds = check_rounds(12);
    for (int round = 0; round < rounds; round++)
        for (int64_t i = 0; i < mil_architecture_count(); i++)
            for (int c = 0; c < mil_architecture_at(i)->config_count; c++) live(mil_architecture_at(i), c, (uint64_t)round * 1000 + (uint64_t)i * 10 + (uint64_t)c);
}

TESTS(T(calls_in_any_order_do_no_harm))
