// build: float double
// The trainer: each optimizer against a plain loop and against torch 2.13, schedules, clipping, accumulation, EMA, resuming,
// failing allocations, thread counts. Most tests train a probe whose gradients are the bag's features.
#include "mil.h"
#include "check.h"
#include <stdlib.h>

#define CLOSE (MIL_REAL_IS_FLOAT ? 1e-5 : 1e-11)           // some ten steps of rounding
enum { ROWS = 2, COLS = 3, N = ROWS * COLS, STEPS = 12 };

// ---- an allocator that counts, and fails when told ----
typedef struct { int64_t calls, fail_at, blocks; } counter;

static void *count_reallocate(void *user, void *block, size_t old_size, size_t new_size)
{
    counter *c = (counter *)user;
    (void)old_size;
    if (new_size == 0) {
        c->blocks -= block != NULL;
        free(block);
        return NULL;
    }
    if (++c->calls == c->fail_at) return NULL;
    void *p = realloc(block, new_size);
    c->blocks += !block && p;
    return p;
}

// ---- the probe: loss = sum(x * W) + sum(x b), so dW = x, db = column sums of x ----
// label 1: + sum(spare), which no other loss depends on.  label 2: + sum(noise * W), noise drawn.
// In training the buffer `mean` becomes (mean + column sums of x) / 2.
typedef struct { int64_t in_dim, num_classes; } probe_config;
typedef struct { mil_param *W, *b, *spare, *mean; } probe;

static const mil_option probe_options[] = {
    { "in_dim", MIL_OPTION_INT, offsetof(probe_config, in_dim), "3", NULL, "columns" },
    { "num_classes", MIL_OPTION_INT, offsetof(probe_config, num_classes), "3", NULL, "labels" },
};
static const mil_config probe_configs[] = { { "base", "" } };

static void probe_declare(mil_builder *b, void *model, const void *config)
{
    probe *p = (probe *)model;
    const mil_init zero = { MIL_INIT_CONSTANT, 0 };
    const int64_t shape[2] = { ROWS, COLS }, cols = COLS, two = 2;
    (void)config;
    p->W = mil_declare(b, zero, 2, shape, "W");
    p->b = mil_declare(b, zero, 1, &cols, "b");
    p->spare = mil_declare(b, zero, 1, &two, "spare");
    p->mean = mil_declare_buffer(b, MIL_REAL_DTYPE, zero, 1, &cols, "mean");
}

static void probe_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const probe *p = (const probe *)model;
    mil_tape *tape = in->tape;
    const int64_t shape[2] = { ROWS, COLS }, one[2] = { 1, 1 }, cols = COLS;
    mil_node *x = mil_reshape(in->features, 2, shape), *W = mil_use(tape, p->W), *sums = mil_reshape(mil_sum(x, 0), 1, &cols);
    mil_node *y = mil_add(mil_sum_all(mil_mul(x, W)), mil_sum_all(mil_mul(sums, mil_use(tape, p->b))));
    const int64_t label = in->target ? in->target->label : 0;
    (void)config;
    if (label == 1) y = mil_add(y, mil_sum_all(mil_use(tape, p->spare)));
    if (label == 2) y = mil_add(y, mil_sum_all(mil_mul(mil_random_uniform(tape, "noise", 2, shape), W)));
    if (mil_tape_is_training(tape)) mil_update(p->mean, mil_affine(mil_add(mil_use(tape, p->mean), sums), 0.5, 0));
    out->logits = mil_reshape(y, 2, one);
    out->loss = y;
}

static const mil_architecture probe_architecture = {
    "probe", "gradients as given", "", "", probe_options, 2, sizeof(probe_config), probe_configs, 1, sizeof(probe), "", 0,
    probe_declare, probe_forward
};

typedef struct {
    counter      memory;
    mil_context *ctx;
    mil_model   *model;
    mil_trainer *trainer;
} rig;

static int rig_open(rig *r, const char *model, const char *model_options, const char *options, int threads, int64_t fail_at)
{
    memset(r, 0, sizeof *r);
    mil_context_options o = mil_context_options_default();
    o.threads = threads;
    o.allocator.reallocate = count_reallocate;
    o.allocator.user = &r->memory;
    if (mil_context_create(&r->ctx, &o) != MIL_OK) return 0;
    r->memory.fail_at = fail_at ? r->memory.calls + fail_at : 0;
    if (mil_register(r->ctx, &probe_architecture) != MIL_OK) return 0;
    r->model = mil_create(r->ctx, model, model_options);
    if (r->model) r->trainer = mil_trainer_create(r->model, options);
    return r->trainer != NULL;
}

static void rig_close(rig *r)
{
    mil_trainer_free(r->trainer);
    mil_model_free(r->model);
    mil_context_free(r->ctx);
    CHECK(r->memory.blocks == 0);
}

static void probe_start(rig *r)
{
    mil_real W[N], b[COLS];
    for (int i = 0; i < N; i++) W[i] = (mil_real)(0.5 * cos((double)i));
    for (int j = 0; j < COLS; j++) b[j] = (mil_real)(0.1 * (j + 1));
    CHECK(mil_param_write(mil_model_find(r->model, "W"), W, N) == MIL_OK);
    CHECK(mil_param_write(mil_model_find(r->model, "b"), b, COLS) == MIL_OK);
}

static void probe_open(rig *r, const char *options)
{
    if (!CHECK(rig_open(r, "probe", "in_dim=3", options, 1, 0))) puts(mil_error(r->ctx));
    else probe_start(r);
}

static double grad_at(int t, int i) { return sin(1.3 * t + 0.7 * i + 0.2) * (1 + t % 3); }

static mil_status probe_step(rig *r, int t, int64_t label)
{
    mil_real x[N];
    for (int i = 0; i < N; i++) x[i] = (mil_real)grad_at(t, i);
    mil_bag bag;
    memset(&bag, 0, sizeof bag);
    bag.features = mil_tensor_matrix(x, MIL_REAL_DTYPE, ROWS, COLS);
    const mil_target target = mil_target_class(label);
    return mil_trainer_step(r->trainer, &bag, &target, NULL, NULL);
}

static void probe_values(rig *r, double *values)           // W, then b
{
    mil_real W[N], b[COLS];
    CHECK(mil_param_read(mil_model_find(r->model, "W"), W, N) == MIL_OK);
    CHECK(mil_param_read(mil_model_find(r->model, "b"), b, COLS) == MIL_OK);
    for (int i = 0; i < N; i++) values[i] = (double)W[i];
    for (int j = 0; j < COLS; j++) values[N + j] = (double)b[j];
}

// ---- optimizers ----
typedef struct { const char *options; double after[N + COLS]; } torch_row;
static const torch_row torch_rows[] = {
    { "optimizer=sgd lr=0.05 weight_decay=0.1",
      { 0.280857194396424, 0.115963503787966, -0.217706763365624, -0.360999432684252, -0.125192459828117,
        0.307695578368756, 0.0093083956829624, 0.232457988925426, 0.434850941590799 } },
    { "optimizer=sgd lr=0.05 momentum=0.9 weight_decay=0.1",
      { -0.237073122109369, -0.233431399038305, -0.209712180202299, -0.0182672253085782, 0.346142211824247,
        0.656283089570097, -0.185095922284686, 0.302504442609344, 0.717386673963661 } },
    { "optimizer=sgd lr=0.05 momentum=0.9 nesterov=true weight_decay=0.1",
      { -0.348925793562393, -0.314011090163968, -0.21817862616004, 0.0470952242750651, 0.449201276811139,
        0.745008870479304, -0.233890101650196, 0.318758746576136, 0.788763481800317 } },
    { "optimizer=adam lr=0.01 weight_decay=0.1",
      { 0.456338032365914, 0.238276389036548, -0.221462673052042, -0.486082814623637, -0.306553908369881,
        0.178144788513285, 0.0773471865426849, 0.193460316353678, 0.310807176608004 } },
    { "optimizer=adamw lr=0.01 weight_decay=0.1",
      { 0.453970253977766, 0.237105354708357, -0.220209398487107, -0.483702696104725, -0.304938845117795,
        0.177313356698224, 0.0769232712959491, 0.192506851444462, 0.309265192617769 } },
    { "optimizer=adamw lr=0.01 weight_decay=0.1 beta1=0.8 beta2=0.95 eps=0.001",
      { 0.458260045087646, 0.240698646642356, -0.219330516323243, -0.48528741348536, -0.308775213519874,
        0.173089837516732, 0.0791996806354583, 0.192228814827765, 0.306300671360499 } },
    { "optimizer=radam lr=0.01 weight_decay=0.1",
      { 0.467089729059881, 0.245843800005044, -0.211732551410229, -0.476808161932444, -0.296454499330808,
        0.169336587075797, 0.0848474730171325, 0.204728535981727, 0.321885616276075 } },
    { "optimizer=radam lr=0.01 weight_decay=0.1 decoupled=true",
      { 0.463966863575673, 0.24420713490156, -0.210284444235497, -0.473590427894358, -0.294482736896185,
        0.168154959070818, 0.0842932629411919, 0.203337229967018, 0.3196826721456 } },
    { "optimizer=adamw lr=0.01 weight_decay=0.1 decay_all=false",
      { 0.453970253977766, 0.237105354708357, -0.220209398487107, -0.483702696104725, -0.304938845117795,
        0.177313356698224, 0.0779084145659162, 0.194814589063915, 0.312914160298723 } },
    { "optimizer=sgd lr=0.05 weight_decay=0 clip_norm=1.5",
      { 0.448865547301202, 0.212843771130513, -0.244601172067133, -0.49356480071278, -0.288104393630719,
        0.199625072648468, 0.0502969948886447, 0.18141003499753, 0.321266226123293 } },
    { "optimizer=adam lr=0.01 weight_decay=0 clip_value=0.5",
      { 0.452604277095403, 0.250331159250549, -0.239741603305909, -0.50095867225901, -0.314157322239595,
        0.171578618717397, 0.0638579116999415, 0.198967485122984, 0.286886207276838 } },
    { "optimizer=sgd lr=0.05 momentum=0.9 weight_decay=0 clip_value=0.5 clip_norm=1",
      { 0.271518026139458, 0.216168853967281, -0.36119331276944, -0.520653614579732, -0.203607042990279,
        0.242541788959751, -0.103897895630298, 0.256075247615875, 0.216519777862673 } },
    { "optimizer=sgd lr=0.05 momentum=0.9 weight_decay=0 accumulate=3",
      { 0.360847248147166, 0.179375742744703, -0.207778392982501, -0.403769542533003, -0.187568769367359,
        0.26361758799189, 0.0520739539143852, 0.24847763087508, 0.422081520551347 } },
    { "optimizer=adam lr=0.01 weight_decay=0 lookahead=true lookahead_k=5",
      { 0.478522407243908, 0.253862793048745, -0.216088036573511, -0.492060266163019, -0.316744259260706,
        0.161928583636174, 0.0879651853525615, 0.197203231700031, 0.307121534796903 } },
    { "optimizer=sgd lr=0.05 weight_decay=0 schedule=cosine steps=10 warmup=3 warmup_lr=0.001 min_lr=0.002",
      { 0.485282530259996, 0.259817658716185, -0.209162933173365, -0.486329368000412, -0.312474704161132,
        0.155110756714333, 0.0939494105598064, 0.204013612052789, 0.312190149082926 } },
    { "optimizer=sgd lr=0.05 weight_decay=0 ema=0.9",
      { 0.431519117155783, 0.221136275404575, -0.214569827707634, -0.455918826772817, -0.260549279888824,
        0.204129725638951, 0.0705965386831885, 0.217257653013486, 0.355802223473275 } },
};

TEST(optimizers_equal_torch_after_twelve_steps)
{
    for (int k = 0; k < (int)(sizeof torch_rows / sizeof *torch_rows); k++) {
        rig r;
        double values[N + COLS];
        probe_open(&r, torch_rows[k].options);
        for (int t = 0; t < STEPS; t++) CHECK(probe_step(&r, t, 0) == MIL_OK);
        if (strstr(torch_rows[k].options, "ema=")) CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
        probe_values(&r, values);
        const int before = check_failures;
        for (int i = 0; i < N + COLS; i++) CHECK_NEAR(values[i], torch_rows[k].after[i], CLOSE);
        if (check_failures > before) printf("with %s\n", torch_rows[k].options);
        rig_close(&r);
    }
}

// One step of everything, element by element in double, from the papers' formulas.
typedef struct { double p, m, v, slow, ema; } element;
typedef struct {
    const char *options;
    int kind, nesterov, decoupled, look;                   // kind 0 SGD, 1 Adam, 2 RAdam
    double lr, decay, momentum, b1, b2, eps, alpha, ema;
} plain;

static void plain_step(const plain *o, element *e, double g, int k)
{
    if (!o->decoupled) g += o->decay * e->p;
    else e->p -= o->lr * o->decay * e->p;
    if (o->kind == 0) {
        e->m = o->momentum * e->m + g;
        e->p -= o->lr * (o->nesterov ? g + o->momentum * e->m : e->m);
    } else {
        e->m = o->b1 * e->m + (1 - o->b1) * g;
        e->v = o->b2 * e->v + (1 - o->b2) * g * g;
        const double m = e->m / (1 - pow(o->b1, k)), rest = 1 - pow(o->b2, k);
        const double R = 2 / (1 - o->b2) - 1, rho = R - 2 * k * pow(o->b2, k) / rest;
        if (o->kind == 1) e->p -= o->lr * m / (sqrt(e->v / rest) + o->eps);
        else if (rho <= 5) e->p -= o->lr * m;
        else e->p -= o->lr * m * sqrt((rho - 4) * (rho - 2) * R / ((R - 4) * (R - 2) * rho)) * sqrt(rest) / (sqrt(e->v) + o->eps);
    }
    if (o->look && k % o->look == 0) e->p = e->slow = e->slow + o->alpha * (e->p - e->slow);
    e->ema = o->ema * e->ema + (1 - o->ema) * e->p;
}

TEST(optimizers_equal_a_plain_loop_at_every_step)
{
    static const plain rows[] = {
        { "optimizer=sgd lr=0.1 weight_decay=0.01", 0, 0, 0, 0, 0.1, 0.01, 0, 0, 0, 0, 0, 0 },
        { "optimizer=sgd lr=0.1 weight_decay=0.01 momentum=0.8 nesterov=true lookahead=true lookahead_k=2 lookahead_alpha=0.8",
          0, 1, 0, 2, 0.1, 0.01, 0.8, 0, 0, 0, 0.8, 0 },
        { "optimizer=adam lr=0.02 weight_decay=0.3 beta1=0.7 beta2=0.99 eps=0.01", 1, 0, 0, 0, 0.02, 0.3, 0, 0.7, 0.99, 0.01, 0, 0 },
        { "lr=0.02 weight_decay=0.3 lookahead=true lookahead_k=3 ema=0.75", 1, 0, 1, 3, 0.02, 0.3, 0, 0.9, 0.999, 1e-8, 0.5, 0.75 },
        { "optimizer=radam lr=0.02 weight_decay=0.3 beta2=0.9 decoupled=true", 2, 0, 1, 0, 0.02, 0.3, 0, 0.9, 0.9, 1e-8, 0, 0 },
    };
    for (int k = 0; k < (int)(sizeof rows / sizeof *rows); k++) {
        rig r;
        element e[N + COLS];
        double values[N + COLS];
        memset(e, 0, sizeof e);
        probe_open(&r, rows[k].options);
        probe_values(&r, values);
        for (int i = 0; i < N + COLS; i++) e[i].p = e[i].slow = e[i].ema = values[i];
        for (int t = 0; t < 20; t++) {
            CHECK(probe_step(&r, t, 0) == MIL_OK);
            for (int i = 0; i < N + COLS; i++)
                plain_step(&rows[k], &e[i], i < N ? grad_at(t, i) : grad_at(t, i - N) + grad_at(t, i - N + COLS), t + 1);
            probe_values(&r, values);
            for (int i = 0; i < N + COLS; i++) CHECK_NEAR(values[i], e[i].p, CLOSE);
            if (rows[k].ema == 0) continue;
            CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
            probe_values(&r, values);
            for (int i = 0; i < N + COLS; i++) CHECK_NEAR(values[i], e[i].ema, CLOSE);
            CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
        }
        rig_close(&r);
    }
}

// ---- schedules ----
static void check_rates(const char *options, const double *rates, int count)
{
    rig r;
    probe_open(&r, options);
    for (int t = 0; t < count && r.trainer; t++) {
        CHECK_NEAR(mil_trainer_lr(r.trainer) / rates[t], 1, 1e-12);
        CHECK(mil_trainer_steps(r.trainer) == t);
        CHECK(probe_step(&r, t, 0) == MIL_OK);
    }
    rig_close(&r);
}

TEST(schedules_follow_their_formulas)
{
    // cosine over 4: (1 + cos(pi t / 4)) / 2 = 1, 0.8535.., 0.5, 0.1464.., 0 between min_lr 0.1 and lr 1.1
    static const double cosine[6] = { 1.1, 0.95355339059327373, 0.6, 0.24644660940672627, 0.1, 0.1 };
    static const double beneath[6] = { 0.1, 0.6, 0.6, 0.24644660940672627, 0.1, 0.1 };
    static const double shifted[7] = { 0.1, 0.6, 1.1, 0.95355339059327373, 0.6, 0.24644660940672627, 0.1 };
    static const double step[6] = { 1, 1, 1, 0.2, 0.2, 0.04 };                      // floor(t / 2.5) = 0 0 0 1 1 2
    static const double slow[6] = { 1, 1, 1, 0.5, 0.5, 0.5 };
    static const double constant[3] = { 0.3, 0.3, 0.3 };
    check_rates("lr=0.3", constant, 3);
    check_rates("lr=1.1 schedule=cosine steps=4 min_lr=0.1", cosine, 6);
    check_rates("lr=1.1 schedule=cosine steps=4 min_lr=0.1 warmup=2 warmup_lr=0.1 warmup_shift=false", beneath, 6);
    check_rates("lr=1.1 schedule=cosine steps=6 min_lr=0.1 warmup=2 warmup_lr=0.1", shifted, 7);
    check_rates("lr=1 schedule=step every=2.5 gamma=0.2", step, 6);
    check_rates("lr=1 schedule=step every=1 gamma=0.5 schedule_unit=3", slow, 6);
}

TEST(the_rate_can_be_scaled_on_the_way)
{
    rig r;
    double before[N + COLS], after[N + COLS];
    probe_open(&r, "optimizer=sgd lr=0.5 weight_decay=0");
    mil_trainer_scale_lr(r.trainer, 0.5);
    mil_trainer_scale_lr(r.trainer, 0.5);
    CHECK(mil_trainer_lr(r.trainer) == 0.125);
    probe_values(&r, before);
    CHECK(probe_step(&r, 0, 0) == MIL_OK);
    probe_values(&r, after);
    for (int i = 0; i < N; i++) CHECK_NEAR(after[i], before[i] - 0.125 * grad_at(0, i), CLOSE);
    rig_close(&r);
}

TEST(a_factor_that_is_no_rate_leaves_the_rate)
{
    static const double factors[] = { (double)NAN, (double)INFINITY, -(double)INFINITY, -1, -1e-300, 1e308 };
    rig r;
    double before[N + COLS], after[N + COLS];
    probe_open(&r, "optimizer=sgd lr=0.5 weight_decay=0");
    mil_trainer_scale_lr(r.trainer, 20);
    for (int k = 0; k < 6; k++) {
        mil_trainer_scale_lr(r.trainer, factors[k]);       // the last one's product is infinite
        CHECK(mil_trainer_lr(r.trainer) == 10);
    }
    mil_trainer_scale_lr(NULL, 0.5);
    mil_trainer_scale_lr(r.trainer, 0.0125);
    CHECK_NEAR(mil_trainer_lr(r.trainer), 0.125, 1e-15);
    probe_values(&r, before);
    CHECK(probe_step(&r, 0, 0) == MIL_OK);
    probe_values(&r, after);
    for (int i = 0; i < N; i++) CHECK_NEAR(after[i], before[i] - 0.125 * grad_at(0, i), CLOSE);
    mil_trainer_scale_lr(r.trainer, 0);                    // a rate of 0 is one
    CHECK(mil_trainer_lr(r.trainer) == 0);
    rig_close(&r);
}

TEST(the_average_with_warmup_follows_its_decay)
{
    // q = 0, 0, 0, 1, 2: decay 0, 0, 0, 1 - 2^-(2/3) = 0.370.., 1 - 3^-(2/3) = 0.519.. but at most 0.5
    static const double decay[5] = { 0, 0, 0, 0.37003947505256341, 0.5 };
    rig r;
    double ema[N + COLS], values[N + COLS];
    probe_open(&r, "optimizer=sgd lr=0.1 ema=0.5 ema_warmup=true ema_after=1");
    probe_values(&r, ema);
    for (int t = 0; t < 5; t++) {
        CHECK(probe_step(&r, t, 0) == MIL_OK);
        probe_values(&r, values);
        for (int i = 0; i < N + COLS; i++) ema[i] = decay[t] * ema[i] + (1 - decay[t]) * values[i];
        CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
        probe_values(&r, values);
        for (int i = 0; i < N + COLS; i++) CHECK_NEAR(values[i], ema[i], CLOSE);
        CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
    }
    rig_close(&r);
}

// ---- gradients: sums, clipping, what has none ----
TEST(the_gradient_norm_is_that_before_clipping)
{
    rig r;
    double sum = 0;
    for (int i = 0; i < N; i++) sum += grad_at(2, i) * grad_at(2, i);
    for (int j = 0; j < COLS; j++) sum += (grad_at(2, j) + grad_at(2, j + COLS)) * (grad_at(2, j) + grad_at(2, j + COLS));
    probe_open(&r, "clip_norm=0.1");
    CHECK(probe_step(&r, 2, 0) == MIL_OK);
    CHECK_NEAR(mil_trainer_grad_norm(r.trainer), sqrt(sum), CLOSE);
    rig_close(&r);
}

TEST(summed_gradients_are_the_mean_times_the_count)
{
    rig a, b;
    double x[N + COLS], y[N + COLS];
    probe_open(&a, "optimizer=sgd lr=0.3 weight_decay=0 accumulate=3 reduction=mean");
    probe_open(&b, "optimizer=sgd lr=0.1 weight_decay=0 accumulate=3 reduction=sum");
    for (int t = 0; t < 6; t++) {
        CHECK(probe_step(&a, t, 0) == MIL_OK);
        CHECK(probe_step(&b, t, 0) == MIL_OK);
        CHECK(mil_trainer_steps(a.trainer) == (t + 1) / 3);
    }
    probe_values(&a, x);
    probe_values(&b, y);
    for (int i = 0; i < N + COLS; i++) CHECK_NEAR(x[i], y[i], CLOSE);
    rig_close(&a);
    rig_close(&b);
}

TEST(flush_divides_the_last_group_by_its_own_size)
{
    rig r;
    double before[N + COLS], after[N + COLS];
    probe_open(&r, "optimizer=sgd lr=0.1 weight_decay=0 accumulate=5");
    CHECK(mil_trainer_flush(r.trainer) == MIL_OK);
    CHECK(mil_trainer_steps(r.trainer) == 0);
    probe_values(&r, before);
    CHECK(probe_step(&r, 0, 0) == MIL_OK);
    CHECK(probe_step(&r, 1, 0) == MIL_OK);
    CHECK(mil_trainer_flush(r.trainer) == MIL_OK);
    CHECK(mil_trainer_steps(r.trainer) == 1);
    probe_values(&r, after);
    for (int i = 0; i < N; i++) CHECK_NEAR(after[i], before[i] - 0.05 * (grad_at(0, i) + grad_at(1, i)), CLOSE);
    rig_close(&r);
}

TEST(a_parameter_without_a_gradient_is_left_alone_and_counts_its_own_updates)
{
    rig r;
    mil_real spare[2] = { 1, 1 };
    probe_open(&r, "optimizer=adam lr=0.1 weight_decay=0");
    mil_param *p = mil_model_find(r.model, "spare");
    CHECK(mil_param_write(p, spare, 2) == MIL_OK);
    for (int t = 0; t < 3; t++) CHECK(probe_step(&r, t, 0) == MIL_OK);
    CHECK(mil_param_read(p, spare, 2) == MIL_OK);
    CHECK(spare[0] == 1 && spare[1] == 1);
    CHECK(probe_step(&r, 3, 1) == MIL_OK);                 // its first step: lr whatever the gradient
    CHECK(mil_param_read(p, spare, 2) == MIL_OK);
    CHECK_NEAR(spare[0], 1 - 0.1 / (1 + 1e-8), CLOSE);
    CHECK(probe_step(&r, 4, 0) == MIL_OK);
    CHECK(mil_param_read(p, spare, 2) == MIL_OK);
    CHECK_NEAR(spare[0], 1 - 0.1 / (1 + 1e-8), CLOSE);
    rig_close(&r);
}

TEST(a_frozen_parameter_stays_and_thaws)
{
    rig r;
    double before[N + COLS], after[N + COLS];
    probe_open(&r, "optimizer=sgd lr=0.1");
    mil_param_freeze(mil_model_find(r.model, "W"), 1);
    probe_values(&r, before);
    CHECK(probe_step(&r, 0, 0) == MIL_OK);
    probe_values(&r, after);
    CHECK(memcmp(before, after, N * sizeof *before) == 0);
    CHECK(before[N] != after[N]);
    mil_param_freeze(mil_model_find(r.model, "b"), 1);
    CHECK(probe_step(&r, 1, 0) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(r.ctx), "frozen");
    mil_param_freeze(mil_model_find(r.model, "W"), 0);
    CHECK(probe_step(&r, 1, 0) == MIL_OK);
    probe_values(&r, after);
    CHECK(before[0] != after[0]);
    rig_close(&r);
}

TEST(buffers_are_updated_by_each_forward_pass)
{
    rig r;
    mil_real mean[COLS];
    double plain_mean[COLS] = { 0 };
    probe_open(&r, "accumulate=4");
    for (int t = 0; t < 3; t++) {
        CHECK(probe_step(&r, t, 0) == MIL_OK);
        for (int j = 0; j < COLS; j++) plain_mean[j] = (plain_mean[j] + grad_at(t, j) + grad_at(t, j + COLS)) / 2;
    }
    CHECK(mil_param_read(mil_model_find(r.model, "mean"), mean, COLS) == MIL_OK);
    for (int j = 0; j < COLS; j++) CHECK_NEAR(mean[j], plain_mean[j], CLOSE);
    rig_close(&r);
}

TEST(draws_can_be_supplied_for_a_step)
{
    rig r;
    mil_real noise[N];
    double before[N + COLS], after[N + COLS];
    probe_open(&r, "optimizer=sgd lr=1 weight_decay=0");
    CHECK(probe_step(&r, 0, 2) == MIL_OK);
    for (int i = 0; i < N; i++) noise[i] = (mil_real)(i + 1);
    const mil_tensor t = mil_tensor_matrix(noise, MIL_REAL_DTYPE, ROWS, COLS);
    probe_values(&r, before);
    mil_tape_reset(mil_trainer_tape(r.trainer));
    mil_tape_draw(mil_trainer_tape(r.trainer), "noise", &t);
    CHECK(probe_step(&r, 1, 2) == MIL_OK);
    probe_values(&r, after);
    for (int i = 0; i < N; i++) CHECK_NEAR(after[i], before[i] - grad_at(1, i) - (i + 1), CLOSE);
    rig_close(&r);
}

// ---- ABMIL ----
enum { DIM = 12, BAGS = 8, INSTANCES = 30 };
#define SMALL_ABMIL "in_dim=12 embed_dim=16 attn_dim=8 dropout=0.25"

static float uniform(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(*state >> 40) / 16777216.0f;
}

// Bags of noise; those of class 1 hold three instances with a mark.
static void fill_bags(float *features, uint64_t seed)
{
    for (int b = 0; b < BAGS; b++)
        for (int i = 0; i < INSTANCES; i++)
            for (int d = 0; d < DIM; d++)
                features[(b * INSTANCES + i) * DIM + d] = uniform(&seed) - 0.5f + (b % 2 && i % 10 == b && d == 3 ? 2.0f : 0.0f)
                                                        + (b % 2 && i < 3 && d == 3 ? 2.0f : 0.0f);
}

static mil_status abmil_step(rig *r, const float *features, int t, double *loss, mil_real *logits)
{
    const int b = t % BAGS;
    const mil_bag bag = mil_bag_make(features + (size_t)b * INSTANCES * DIM, INSTANCES - b, DIM);
    const mil_target target = mil_target_class(b % 2);
    return mil_trainer_step(r->trainer, &bag, &target, loss, logits);
}

// All weights, one after the other; returns the count.
static int64_t weights_of(rig *r, mil_real *dst, int64_t room)
{
    int64_t count = 0;
    for (int64_t i = 0; i < mil_model_param_count(r->model); i++) {
        const mil_param *p = mil_model_param(r->model, i);
        if (!CHECK(count + p->count <= room)) return 0;
        CHECK(mil_param_read(p, dst + count, p->count) == MIL_OK);
        count += p->count;
    }
    return count;
}

enum { ROOM = 4096 };
static mil_real weights[2][ROOM];
static float features[BAGS * INSTANCES * DIM];

TEST(a_small_model_learns)
{
    static float others[BAGS * INSTANCES * DIM];
    rig r;
    int right = 0;
    fill_bags(features, 1);
    fill_bags(others, 2);
    if (!CHECK(rig_open(&r, "abmil", SMALL_ABMIL, "lr=0.005 weight_decay=0.01 clip_norm=5 schedule=cosine steps=200 warmup=10", 1, 0))) puts(mil_error(r.ctx));
    double first = 0, last = 0, loss;
    for (int t = 0; t < 200; t++) {
        CHECK(abmil_step(&r, features, t, &loss, NULL) == MIL_OK);
        if (t < BAGS) first += loss / BAGS;
        if (t >= 200 - BAGS) last += loss / BAGS;
    }
    CHECK(last < 0.2 && first > 0.5);
    for (int t = 0; t < BAGS; t++) {                       // bags that it has not seen; a rate of 0 only looks
        mil_real logits[2];
        mil_trainer_scale_lr(r.trainer, 0);
        CHECK(abmil_step(&r, others, t, NULL, logits) == MIL_OK);
        right += (logits[1] > logits[0]) == t % 2;
    }
    CHECK(right == BAGS);
    rig_close(&r);
}

TEST(accumulated_bags_equal_one_batch)
{
    rig a, b;
    static const int64_t labels[4] = { 0, 1, 0, 1 };
    fill_bags(features, 3);
    const char *model = "in_dim=12 embed_dim=16 attn_dim=8 dropout=0";
    CHECK(rig_open(&a, "abmil", model, "optimizer=sgd lr=0.1 accumulate=4", 1, 0));
    CHECK(rig_open(&b, "abmil", model, "optimizer=sgd lr=0.1", 1, 0));
    double single = 0, batch = 0, loss = 0;
    for (int t = 0; t < 8; t++) {
        const mil_bag bag = mil_bag_make(features + (size_t)(t % 4) * INSTANCES * DIM, INSTANCES, DIM);
        const mil_target target = mil_target_class(labels[t % 4]);
        CHECK(mil_trainer_step(a.trainer, &bag, &target, &loss, NULL) == MIL_OK);
        single += loss / 4;
    }
    for (int t = 0; t < 2; t++) {
        const int64_t shape[3] = { 4, INSTANCES, DIM };
        mil_bag bag;
        memset(&bag, 0, sizeof bag);
        bag.features = mil_tensor_make(features, MIL_F32, 3, shape);
        mil_target target = mil_target_class(0);
        target.labels = labels;
        target.count = 4;
        CHECK(mil_trainer_step(b.trainer, &bag, &target, &loss, NULL) == MIL_OK);
        batch += loss;
    }
    CHECK_NEAR(single, batch, CLOSE);
    const int64_t n = weights_of(&a, weights[0], ROOM);
    weights_of(&b, weights[1], ROOM);
    for (int64_t i = 0; i < n; i++) CHECK_NEAR(weights[0][i], weights[1][i], CLOSE);
    rig_close(&a);
    rig_close(&b);
}

#define EVERYTHING "lr=0.01 weight_decay=0.1 accumulate=2 clip_norm=0.5 clip_value=0.2 lookahead=true lookahead_k=2 ema=0.8 schedule=cosine steps=20 seed=7"

TEST(thread_counts_give_the_same_bits)
{
    static const int threads[5] = { 1, 2, 3, 5, 8 };
    int64_t n = 0;
    fill_bags(features, 4);
    for (int k = 0; k < 5; k++) {
        rig r;
        CHECK(rig_open(&r, "abmil", SMALL_ABMIL, EVERYTHING, threads[k], 0));
        for (int t = 0; t < 9; t++) CHECK(abmil_step(&r, features, t, NULL, NULL) == MIL_OK);
        n = weights_of(&r, weights[k > 0], ROOM);
        if (k) CHECK(memcmp(weights[0], weights[1], (size_t)n * sizeof(mil_real)) == 0);
        rig_close(&r);
    }
}

// ---- a backend whose memory the host cannot touch: its addresses have the top bit flipped. It runs nothing itself. ----
static void *flip(const void *p) { return (void *)((uintptr_t)p ^ (uintptr_t)1 << (8 * sizeof p - 1)); }

static mil_status far_open(void **self, mil_context *ctx) { *self = NULL; (void)ctx; return MIL_OK; }
static void far_close(void *self, mil_context *ctx) { (void)self; (void)ctx; }
static void *far_allocate(void *self, mil_context *ctx, size_t bytes)
{
    char *block = (char *)malloc(bytes + 128), *at = block + 64 - (uintptr_t)block % 64;       // the distance stands before it
    (void)self, (void)ctx;
    at[-1] = (char)(at - block);
    return flip(at);
}
static void far_release(void *self, mil_context *ctx, void *memory, size_t bytes)
{
    char *at = (char *)flip(memory);
    (void)self, (void)ctx, (void)bytes;
    free(at - at[-1]);
}
static mil_status far_upload(void *self, void *dst, const void *src, size_t bytes) { (void)self; memcpy(flip(dst), src, bytes); return MIL_OK; }
static mil_status far_download(void *self, void *dst, const void *src, size_t bytes) { (void)self; memcpy(dst, flip(src), bytes); return MIL_OK; }
static int far_supports(void *self, const mil_node *node) { (void)self, (void)node; return 0; }
static mil_status far_run(void *self, mil_context *ctx, mil_node *const *nodes, int64_t count)
{
    (void)self, (void)ctx, (void)nodes, (void)count;
    return MIL_ERROR_BACKEND;
}
static mil_status far_synchronize(void *self) { (void)self; return MIL_OK; }
static const mil_backend far_backend = {
    "far", far_open, far_close, far_allocate, far_release, far_upload, far_download, far_supports, far_run, far_synchronize, 0
};

static char *state_of(rig *r, size_t *size)
{
    *size = 0;
    CHECK(mil_trainer_save(r->trainer, NULL, size) == MIL_OK);
    char *bytes = (char *)malloc(*size);
    if (!CHECK(mil_trainer_save(r->trainer, bytes, size) == MIL_OK)) puts(mil_error(r->ctx));
    return bytes;
}

static void copy_weights(rig *from, rig *to)
{
    for (int64_t i = 0; i < mil_model_param_count(from->model); i++) {
        const mil_param *p = mil_model_param(from->model, i);
        CHECK(mil_param_read(p, weights[1], p->count) == MIL_OK);
        CHECK(mil_param_write(mil_model_param(to->model, i), weights[1], p->count) == MIL_OK);
    }
}

TEST(a_restored_trainer_goes_on_with_the_same_bits)
{
    static const char *const options[4] = { EVERYTHING, "optimizer=sgd momentum=0.9 nesterov=true lr=0.05 accumulate=3",
                                            "optimizer=radam lr=0.01 ema=0.9 ema_warmup=true", "optimizer=sgd lr=0.1" };
    fill_bags(features, 5);
    for (int k = 0; k < 4; k++)
        for (int stop = 0; stop < 8; stop++) {
            rig a, b;
            size_t size, size2;
            CHECK(rig_open(&a, "abmil", SMALL_ABMIL, options[k], 1, 0));
            CHECK(rig_open(&b, "abmil", SMALL_ABMIL, options[k], 1, 0));
            for (int t = 0; t < stop; t++) {
                CHECK(abmil_step(&a, features, t, NULL, NULL) == MIL_OK);
                if (t == 3) mil_trainer_scale_lr(a.trainer, 0.7);
            }
            char *bytes = state_of(&a, &size);
            copy_weights(&a, &b);
            CHECK(abmil_step(&b, features, 5, NULL, NULL) == MIL_OK);                // leaves traces that the restore must clear
            copy_weights(&a, &b);
            if (!CHECK(mil_trainer_restore(b.trainer, bytes, size) == MIL_OK)) puts(mil_error(b.ctx));
            char *again = state_of(&b, &size2);
            CHECK(size == size2 && memcmp(bytes, again, size) == 0);
            for (int t = stop; t < stop + 7; t++) {
                double x, y;
                CHECK(abmil_step(&a, features, t, &x, NULL) == MIL_OK);
                CHECK(abmil_step(&b, features, t, &y, NULL) == MIL_OK);
                CHECK(x == y);
            }
            const int64_t n = weights_of(&a, weights[0], ROOM);
            weights_of(&b, weights[1], ROOM);
            CHECK(memcmp(weights[0], weights[1], (size_t)n * sizeof(mil_real)) == 0);
            free(bytes);
            free(again);
            rig_close(&a);
            rig_close(&b);
        }
}

TEST(a_backend_with_memory_of_its_own_trains_alike)
{
    rig here, there;
    double x, y;
    size_t size;
    fill_bags(features, 10);
    memset(&there, 0, sizeof there);
    mil_context_options o = mil_context_options_default();
    o.threads = 1;
    o.backend = &far_backend;
    CHECK(rig_open(&here, "abmil", SMALL_ABMIL, EVERYTHING, 1, 0));
    CHECK(mil_context_create(&there.ctx, &o) == MIL_OK);
    there.model = mil_create(there.ctx, "abmil", SMALL_ABMIL);
    there.trainer = mil_trainer_create(there.model, EVERYTHING);
    if (!CHECK(there.trainer != NULL)) puts(mil_error(there.ctx));
    for (int t = 0; t < 9; t++) {
        CHECK(abmil_step(&here, features, t, &x, NULL) == MIL_OK);
        if (!CHECK(abmil_step(&there, features, t, &y, NULL) == MIL_OK)) puts(mil_error(there.ctx));
        CHECK_NEAR(y, x, CLOSE);
        if (t == 4) {                                      // its state travels
            char *bytes = state_of(&there, &size);
            CHECK(mil_trainer_restore(here.trainer, bytes, size) == MIL_OK);
            CHECK(mil_trainer_restore(there.trainer, bytes, size) == MIL_OK);
            free(bytes);
        }
    }
    for (int k = 0; k < 2; k++) {
        const int64_t n = weights_of(&here, weights[0], ROOM);
        weights_of(&there, weights[1], ROOM);
        for (int64_t i = 0; i < n; i++) CHECK_NEAR(weights[1][i], weights[0][i], 100 * CLOSE);   // Adam divides small by small
        CHECK(mil_trainer_swap_ema(here.trainer) == MIL_OK);
        CHECK(mil_trainer_swap_ema(there.trainer) == MIL_OK);
    }
    CHECK(mil_context_fallbacks(there.ctx) > 0);
    rig_close(&here);
    rig_close(&there);
}

// Averages and slow weights begin with the first update; until then they are not there to be saved.
TEST(a_state_before_the_first_update_holds_no_averages)
{
    static const char *const kinds[2] = { "ema.W", "slow.W" };
    rig r;
    size_t size;
    probe_open(&r, "optimizer=sgd lr=0.1 weight_decay=0 ema=0.5 lookahead=true");
    for (int steps = 0; steps < 2; steps++) {
        mil_tensors *file = NULL;
        char *bytes = state_of(&r, &size);
        if (CHECK(mil_tensors_open_memory(r.ctx, bytes, size, 0, &file) == MIL_OK))
            for (int k = 0; k < 2; k++) CHECK((mil_tensors_find(file, kinds[k]) >= 0) == (steps > 0));
        mil_tensors_free(file);
        CHECK(mil_trainer_restore(r.trainer, bytes, size) == MIL_OK);
        free(bytes);
        CHECK(probe_step(&r, steps, 0) == MIL_OK);
    }
    rig_close(&r);
}

// Weight decay alone makes squares that no number holds.
TEST(weights_of_absurd_size_stay_numbers_and_so_does_the_state)
{
    static const char *const options[3] = { "optimizer=adam weight_decay=0.1", "optimizer=radam weight_decay=0.1", "optimizer=adamw weight_decay=0.1 lookahead=true ema=0.9" };
    for (int k = 0; k < 3; k++) {
        rig r;
        size_t size;
        mil_real W[N];
        double values[N + COLS];
        probe_open(&r, options[k]);
        for (int i = 0; i < N; i++) W[i] = (mil_real)(MIL_REAL_IS_FLOAT ? 1e37 : 1e307) * (mil_real)(i % 2 ? 1 : -1);
        CHECK(mil_param_write(mil_model_find(r.model, "W"), W, N) == MIL_OK);
        for (int t = 0; t < 8; t++) {                      // radam changes its formula in the sixth
            CHECK(probe_step(&r, t, 0) == MIL_OK);
            probe_values(&r, values);
            for (int i = 0; i < N + COLS; i++) CHECK(isfinite(values[i]));
            char *bytes = state_of(&r, &size);
            if (!CHECK(mil_trainer_restore(r.trainer, bytes, size) == MIL_OK)) puts(mil_error(r.ctx));
            free(bytes);
        }
        rig_close(&r);
    }
}

// One-hot targets of one size name the first class.
TEST(equal_targets_of_one_bag_name_the_first_class)
{
    static const double values[2] = { 0.5, 0.5 };
    static mil_real before[2][32], after[2][32];
    static const char *const keys[2] = { "instance_classifiers.0.weight", "instance_classifiers.1.weight" };
    rig r;
    mil_real x[10 * 6];
    for (int i = 0; i < 60; i++) x[i] = (mil_real)sin(1.7 * i);
    CHECK(rig_open(&r, "clam", "in_dim=6 embed_dim=4 attention_dim=4 k_sample=3 instance_loss_fn=ce dropout=0", "optimizer=sgd lr=0.1 weight_decay=0", 1, 0));
    mil_bag bag;
    memset(&bag, 0, sizeof bag);
    bag.features = mil_tensor_matrix(x, MIL_REAL_DTYPE, 10, 6);
    mil_target target = mil_target_value(0);
    target.values = values;
    target.count = 2;
    for (int k = 0; k < 2; k++) CHECK(mil_param_read(mil_model_find(r.model, keys[k]), before[k], 8) == MIL_OK);
    if (!CHECK(mil_trainer_step(r.trainer, &bag, &target, NULL, NULL) == MIL_OK)) puts(mil_error(r.ctx));
    for (int k = 0; k < 2; k++) CHECK(mil_param_read(mil_model_find(r.model, keys[k]), after[k], 8) == MIL_OK);
    CHECK(memcmp(before[0], after[0], 8 * sizeof(mil_real)) != 0 && memcmp(before[1], after[1], 8 * sizeof(mil_real)) == 0);
    rig_close(&r);
}

TEST(a_state_that_does_not_fit_is_refused_and_changes_nothing)
{
    static const char *const others[4] = { "optimizer=sgd momentum=0.9 accumulate=2", "optimizer=adam accumulate=2", "optimizer=adamw accumulate=2 ema=0.5", "optimizer=adamw accumulate=2 lookahead=true" };
    static const char *const words[4] = { "with optimizer=adamw, this one has optimizer=sgd", "optimizer=adam", "ema=0, this one has ema=0.5", "lookahead=false" };
    rig a, b;
    size_t size, size2;
    probe_open(&a, "optimizer=adamw accumulate=2");
    for (int t = 0; t < 3; t++) CHECK(probe_step(&a, t, 0) == MIL_OK);
    char *bytes = state_of(&a, &size);
    for (int k = 0; k < 4; k++) {
        probe_open(&b, others[k]);
        CHECK(mil_trainer_restore(b.trainer, bytes, size) == MIL_ERROR_FORMAT);
        CHECK_CONTAINS(mil_error(b.ctx), words[k]);
        CHECK(mil_trainer_steps(b.trainer) == 0);
        rig_close(&b);
    }
    CHECK(rig_open(&b, "abmil", SMALL_ABMIL, "optimizer=adamw accumulate=2", 1, 0));
    CHECK(mil_trainer_restore(b.trainer, bytes, size) == MIL_ERROR_FORMAT);
    rig_close(&b);

    probe_open(&b, "optimizer=adamw accumulate=2 lr=0.5 seed=3");            // a rate of its own; the seed does not matter
    CHECK(mil_trainer_restore(b.trainer, bytes, size) == MIL_ERROR_FORMAT);
    CHECK_CONTAINS(mil_error(b.ctx), "with lr=0.0001, this one has lr=0.5");
    rig_close(&b);
    probe_open(&b, "optimizer=adamw accumulate=2 seed=3");
    CHECK(mil_trainer_restore(b.trainer, bytes, size) == MIL_OK);
    rig_close(&b);

    probe_open(&b, "optimizer=adamw accumulate=2");
    CHECK(probe_step(&b, 1, 0) == MIL_OK);
    char *before = state_of(&b, &size2);
    for (size_t cut = 0; cut < size; cut += 13) CHECK(mil_trainer_restore(b.trainer, bytes, cut) == MIL_ERROR_FORMAT);
    char *damaged = (char *)malloc(size);
    memcpy(damaged, bytes, size);
    memset(damaged + size - sizeof(mil_real), 0xff, sizeof(mil_real));               // a NaN in the last tensor
    CHECK(mil_trainer_restore(b.trainer, damaged, size) == MIL_ERROR_FORMAT);
    for (size_t at = 0; at < size; at++) {                 // any byte: refused, or a state to go on from
        memcpy(damaged, bytes, size);
        damaged[at] = (char)(damaged[at] ^ 0x11);
        if (mil_trainer_restore(b.trainer, damaged, size) != MIL_OK) continue;
        const mil_status status = probe_step(&b, 0, 0);
        CHECK(status == MIL_OK || status == MIL_ERROR_NUMERIC);
    }
    CHECK(mil_trainer_restore(b.trainer, before, size2) == MIL_OK);
    CHECK(mil_trainer_restore(b.trainer, NULL, 0) != MIL_OK);
    size_t little = 10;
    CHECK(mil_trainer_save(b.trainer, damaged, &little) == MIL_ERROR_ARGUMENT);
    CHECK(little == size2);
    free(bytes);
    free(before);
    free(damaged);
    rig_close(&a);
    rig_close(&b);
}

// Where the numbers of tensor `name` stand in a state's bytes: after 8 bytes of the header's length, and the header.
static size_t state_place(const char *bytes, const char *name)
{
    char header[4096], key[64];
    size_t size = 0;
    for (int i = 7; i >= 0; i--) size = size << 8 | (unsigned char)bytes[i];
    if (!CHECK(size < sizeof header)) return 0;
    memcpy(header, bytes + 8, size);
    header[size] = 0;
    snprintf(key, sizeof key, "\"%s\":", name);
    const char *at = strstr(header, key);
    if (at) at = strstr(at, "\"data_offsets\":[");
    if (!CHECK(at != NULL)) return 0;
    return 8 + size + (size_t)strtoul(at + strlen("\"data_offsets\":["), NULL, 10);
}

static void put_i64(char *bytes, int64_t value)            // little-endian on any machine, as the format has it
{
    for (int i = 0; i < 8; i++) bytes[i] = (char)((uint64_t)value >> 8 * i & 255);
}

TEST(a_state_whose_counters_are_beyond_counting_is_refused)
{
    enum { UPDATES, BAGS_SEEN, ACCUMULATED, STARTED };
    static const struct { int which[2]; int64_t value; } wrong[] = {
        { { UPDATES, UPDATES }, INT64_MAX }, { { BAGS_SEEN, BAGS_SEEN }, INT64_MAX }, { { ACCUMULATED, ACCUMULATED }, INT64_MAX },
        { { BAGS_SEEN, ACCUMULATED }, INT64_MAX }, { { UPDATES, BAGS_SEEN }, INT64_MAX }, { { UPDATES, UPDATES }, ((int64_t)1 << 53) + 1 },
        { { UPDATES, UPDATES }, INT64_MIN }, { { BAGS_SEEN, BAGS_SEEN }, -1 }, { { ACCUMULATED, ACCUMULATED }, -1 },
        { { ACCUMULATED, ACCUMULATED }, 4 },               // as many as make an update: it would have been made
        { { STARTED, STARTED }, 0 }
    };
    rig r;
    size_t size, size2;
    probe_open(&r, "accumulate=4");
    for (int t = 0; t < 6; t++) CHECK(probe_step(&r, t, 0) == MIL_OK);
    char *bytes = state_of(&r, &size), *damaged = (char *)malloc(size);
    const size_t at = state_place(bytes, "counters");
    if (!CHECK(damaged && at && at + 32 <= size)) return;
    for (int k = 0; k < (int)(sizeof wrong / sizeof *wrong); k++) {
        memcpy(damaged, bytes, size);
        for (int i = 0; i < 2; i++) put_i64(damaged + at + 8 * wrong[k].which[i], wrong[k].value);
        CHECK(mil_trainer_restore(r.trainer, damaged, size) == MIL_ERROR_FORMAT);
        CHECK_CONTAINS(mil_error(r.ctx), "the counters contradict each other");
    }
    char *after = state_of(&r, &size2);
    CHECK(size == size2 && memcmp(bytes, after, size) == 0);
    memcpy(damaged, bytes, size);                          // as many updates as a double counts are a state to go on from
    put_i64(damaged + at, ((int64_t)1 << 53) - 1);
    CHECK(mil_trainer_restore(r.trainer, damaged, size) == MIL_OK);
    CHECK(mil_trainer_steps(r.trainer) == ((int64_t)1 << 53) - 1);
    CHECK(mil_trainer_flush(r.trainer) == MIL_OK);
    free(bytes);
    free(damaged);
    free(after);
    rig_close(&r);
}

// What is written meanwhile would be swapped out, and lost without a word.
TEST(weights_are_not_written_while_the_average_is_swapped_in)
{
    rig r;
    double before[N + COLS], swapped[N + COLS], after[N + COLS];
    mil_real seven[COLS] = { 7, 7, 7 };
    probe_open(&r, "optimizer=sgd lr=0.1 ema=0.9");
    CHECK(probe_step(&r, 0, 0) == MIL_OK);
    mil_param *b = mil_model_find(r.model, "b");
    probe_values(&r, before);
    CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
    probe_values(&r, swapped);
    CHECK(memcmp(before, swapped, sizeof before) != 0);
    const int64_t version = b->version;
    CHECK(mil_param_write(b, seven, COLS) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(r.ctx), "mil_param_write: the averaged weights of a trainer are swapped into probe");
    CHECK(mil_model_init(r.model, 5) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(r.ctx), "mil_model_init: the averaged weights of a trainer are swapped into probe");
    CHECK(b->version == version);
    probe_values(&r, after);
    CHECK(memcmp(after, swapped, sizeof after) == 0);
    CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
    probe_values(&r, after);
    CHECK(memcmp(after, before, sizeof after) == 0);
    CHECK(mil_param_write(b, seven, COLS) == MIL_OK);
    probe_values(&r, after);
    CHECK(after[N] == 7);
    CHECK(mil_model_init(r.model, 5) == MIL_OK);
    rig_close(&r);
}

// A note in the model's file that its head has never been trained, which the first update makes untrue.
TEST(a_fresh_head_is_fresh_until_the_first_update)
{
    rig r;
    mil_real x[N] = { 0 };
    probe_open(&r, "accumulate=2");
    CHECK(mil_model_set_metadata(r.model, "mil.head", "fresh") == MIL_OK && mil_model_set_metadata(r.model, "note", "kept") == MIL_OK);
    CHECK(probe_step(&r, 0, 0) == MIL_OK);                 // half an update
    CHECK_STRING(mil_model_metadata(r.model, "mil.head"), "fresh");
    x[0] = (mil_real)(double)NAN;
    const mil_tensor view = mil_tensor_matrix(x, MIL_REAL_DTYPE, ROWS, COLS);
    const mil_bag bag = mil_bag_from(&view);
    const mil_target target = mil_target_class(0);
    CHECK(mil_trainer_step(r.trainer, &bag, &target, NULL, NULL) == MIL_ERROR_NUMERIC);        // and one that is refused
    CHECK_STRING(mil_model_metadata(r.model, "mil.head"), "fresh");
    CHECK(probe_step(&r, 1, 0) == MIL_OK);
    CHECK(mil_trainer_steps(r.trainer) == 1);
    CHECK(mil_model_metadata(r.model, "mil.head") == NULL);
    CHECK_STRING(mil_model_metadata(r.model, "note"), "kept");
    size_t size = 0;
    CHECK(mil_save_memory(r.model, NULL, &size) == MIL_OK);
    char *bytes = (char *)malloc(size);
    CHECK(bytes && mil_save_memory(r.model, bytes, &size) == MIL_OK);
    mil_model *opened = mil_open_memory(r.ctx, bytes, size);
    CHECK(opened && mil_model_metadata(opened, "mil.head") == NULL);
    mil_model_free(opened);
    free(bytes);
    rig_close(&r);
}

TEST(swapping_the_average_twice_gives_the_weights_back)
{
    rig r;
    size_t size;
    fill_bags(features, 6);
    CHECK(rig_open(&r, "abmil", SMALL_ABMIL, EVERYTHING, 1, 0));
    CHECK(mil_trainer_swap_ema(r.trainer) == MIL_ERROR_STATE);
    for (int t = 0; t < 6; t++) CHECK(abmil_step(&r, features, t, NULL, NULL) == MIL_OK);
    const int64_t n = weights_of(&r, weights[0], ROOM);
    CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
    weights_of(&r, weights[1], ROOM);
    CHECK(memcmp(weights[0], weights[1], (size_t)n * sizeof(mil_real)) != 0);
    CHECK(abmil_step(&r, features, 0, NULL, NULL) == MIL_ERROR_STATE);
    CHECK(mil_trainer_flush(r.trainer) == MIL_ERROR_STATE);
    CHECK(mil_trainer_save(r.trainer, NULL, &size) == MIL_ERROR_STATE);
    size = 0;                                              // what is loaded now would become the average when swapped back
    CHECK(mil_save_memory(r.model, NULL, &size) == MIL_OK);
    char *snapshot = (char *)malloc(size);
    CHECK(snapshot && mil_save_memory(r.model, snapshot, &size) == MIL_OK);
    CHECK(mil_load_memory(r.model, snapshot, size, NULL) == MIL_ERROR_STATE);
    CHECK_CONTAINS(mil_error(r.ctx), "averaged weights");
    CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
    weights_of(&r, weights[1], ROOM);
    CHECK(memcmp(weights[0], weights[1], (size_t)n * sizeof(mil_real)) == 0);
    CHECK(abmil_step(&r, features, 6, NULL, NULL) == MIL_OK);
    CHECK(mil_load_memory(r.model, snapshot, size, NULL) == MIL_OK);
    CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);      // a freed trainer leaves the average in the model, which then loads
    mil_trainer_free(r.trainer);
    r.trainer = NULL;
    CHECK(mil_load_memory(r.model, snapshot, size, NULL) == MIL_OK);
    free(snapshot);
    rig_close(&r);
}

TEST(evaluating_gives_loss_and_logits_and_changes_nothing)
{
    rig r;
    size_t size, size2;
    double loss = 0, trained = 0, averaged = 0;
    mil_real logits[2], at_step[2];
    fill_bags(features, 6);
    CHECK(rig_open(&r, "abmil", SMALL_ABMIL, "optimizer=adam lr=0.01 ema=0.5 accumulate=2", 1, 0));
    for (int t = 0; t < 5; t++) CHECK(abmil_step(&r, features, t, NULL, NULL) == MIL_OK);
    const mil_bag bag = mil_bag_make(features, INSTANCES, DIM);
    mil_target target = mil_target_class(1);
    char *before = state_of(&r, &size);
    CHECK(mil_trainer_evaluate(r.trainer, &bag, &target, &loss, logits) == MIL_OK);
    CHECK_NEAR(loss, log(exp((double)logits[0] - (double)logits[1]) + 1), CLOSE);
    char *after = state_of(&r, &size2);
    CHECK(size == size2 && memcmp(before, after, size) == 0);
    CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
    CHECK(mil_trainer_evaluate(r.trainer, &bag, &target, &averaged, NULL) == MIL_OK);
    CHECK(averaged != loss);
    CHECK(mil_trainer_swap_ema(r.trainer) == MIL_OK);
    CHECK(mil_trainer_evaluate(r.trainer, NULL, &target, &loss, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_trainer_evaluate(NULL, &bag, &target, &loss, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_trainer_step(r.trainer, &bag, &target, &trained, at_step) == MIL_OK);
    CHECK(trained > 0);
    free(before);
    free(after);
    rig_close(&r);
}

TEST(a_target_weighs_its_bag)
{
    double values[3][N + COLS];
    for (int k = 0; k < 3; k++) {
        rig r;
        mil_real x[N];
        double loss = 0;
        for (int i = 0; i < N; i++) x[i] = (mil_real)grad_at(1, i);
        const mil_tensor view = mil_tensor_matrix(x, MIL_REAL_DTYPE, ROWS, COLS);
        const mil_bag bag = mil_bag_from(&view);
        mil_target target = mil_target_class(0);
        probe_open(&r, k == 2 ? "optimizer=sgd weight_decay=0 lr=0.3" : "optimizer=sgd weight_decay=0 lr=0.1");
        CHECK(target.weight == 1 && mil_target_value(0.5).weight == 1);
        if (k == 1) target.weight = 3;
        CHECK(mil_trainer_step(r.trainer, &bag, &target, &loss, NULL) == MIL_OK);
        values[k][0] = 0;
        probe_values(&r, values[k]);
        target.weight = 0;
        CHECK(mil_trainer_step(r.trainer, &bag, &target, &loss, NULL) == MIL_ERROR_ARGUMENT);
        CHECK_CONTAINS(mil_error(r.ctx), "weight is 0, not above 0; make targets by mil_target_class");
        target.weight = (double)NAN;
        CHECK(mil_trainer_step(r.trainer, &bag, &target, &loss, NULL) == MIL_ERROR_ARGUMENT);
        rig_close(&r);
    }
    for (int i = 0; i < N + COLS; i++) CHECK_NEAR(values[1][i], values[2][i], CLOSE);          // three times the loss, three times the step
    CHECK(memcmp(values[0], values[1], sizeof values[0]) != 0);
}

// ---- failures ----
TEST(a_loss_that_is_not_finite_updates_nothing)
{
    rig r;
    size_t size, size2;
    mil_real mean[COLS], mean2[COLS], x[N];
    double before[N + COLS], after[N + COLS], loss = 5;
    probe_open(&r, "accumulate=2 ema=0.5");
    for (int t = 0; t < 3; t++) CHECK(probe_step(&r, t, 0) == MIL_OK);
    probe_values(&r, before);
    mil_param_read(mil_model_find(r.model, "mean"), mean, COLS);
    char *bytes = state_of(&r, &size);
    for (int k = 0; k < 2; k++) {
        memset(x, 0, sizeof x);
        x[4] = k ? (mil_real)NAN : (mil_real)INFINITY;
        mil_bag bag;
        memset(&bag, 0, sizeof bag);
        bag.features = mil_tensor_matrix(x, MIL_REAL_DTYPE, ROWS, COLS);
        const mil_target target = mil_target_class(0);
        CHECK(mil_trainer_step(r.trainer, &bag, &target, &loss, NULL) == MIL_ERROR_NUMERIC);
        CHECK_CONTAINS(mil_error(r.ctx), "row 1 of the features holds NaN or infinity");
        CHECK(mil_trainer_evaluate(r.trainer, &bag, &target, &loss, NULL) == MIL_ERROR_NUMERIC);
    }
    CHECK(loss == 5);
    probe_values(&r, after);
    mil_param_read(mil_model_find(r.model, "mean"), mean2, COLS);
    char *bytes2 = state_of(&r, &size2);
    CHECK(memcmp(before, after, sizeof before) == 0);
    CHECK(memcmp(mean, mean2, sizeof mean) == 0);
    CHECK(size == size2 && memcmp(bytes, bytes2, size) == 0);
    CHECK(probe_step(&r, 3, 0) == MIL_OK);
    CHECK(mil_trainer_steps(r.trainer) == 2);
    free(bytes);
    free(bytes2);
    rig_close(&r);
}

TEST(a_gradient_that_is_not_finite_is_dropped)
{
    rig r;
    mil_real x[N] = { 0 }, zeros[N] = { 0 };
    double before[N + COLS], after[N + COLS];
    probe_open(&r, "optimizer=sgd lr=0.1 momentum=0.9 accumulate=2");
    CHECK(mil_param_write(mil_model_find(r.model, "W"), zeros, N) == MIL_OK);        // so that the loss is finite
    CHECK(mil_param_write(mil_model_find(r.model, "b"), zeros, COLS) == MIL_OK);
    x[0] = (mil_real)(MIL_REAL_IS_FLOAT ? 1e38 : 1e308);
    mil_bag bag;
    memset(&bag, 0, sizeof bag);
    bag.features = mil_tensor_matrix(x, MIL_REAL_DTYPE, ROWS, COLS);
    const mil_target target = mil_target_class(0);
    CHECK(mil_trainer_step(r.trainer, &bag, &target, NULL, NULL) == MIL_OK);
    probe_values(&r, before);
    CHECK(mil_trainer_step(r.trainer, &bag, &target, NULL, NULL) == MIL_ERROR_NUMERIC);
    CHECK_CONTAINS(mil_error(r.ctx), "the gradient of update 0 is not finite");
    probe_values(&r, after);
    CHECK(memcmp(before, after, sizeof before) == 0);
    CHECK(probe_step(&r, 0, 0) == MIL_OK);
    CHECK(mil_trainer_steps(r.trainer) == 0);
    CHECK(probe_step(&r, 0, 0) == MIL_OK);
    probe_values(&r, after);
    for (int i = 0; i < N; i++) CHECK_NEAR(after[i], -0.1 * grad_at(0, i), CLOSE);
    rig_close(&r);
}

TEST(bad_options_are_refused_with_a_sentence)
{
    static const char *const wrong[][2] = {
        { "learning_rate=1", "learning_rate" }, { "lr=fast", "lr=" }, { "lr=-1", "lr" }, { "lr=1e999", "lr" }, { "optimizer=lion", "sgd|adam|adamw|radam" },
        { "beta1=1", "below 1" }, { "beta2=1", "below 1" }, { "ema=1", "ema" }, { "nesterov=true", "momentum" },
        { "schedule=cosine", "steps" }, { "schedule=cosine steps=5 warmup=5", "warmup=5" }, { "schedule=step every=0", "every" },
        { "accumulate=0", "accumulate" }, { "lookahead_k=0", "lookahead_k" }, { "ema=0.5 ema_warmup=true ema_gamma=0", "ema_gamma" },
        { "momentum=1.5", "momentum" }, { "schedule_unit=0", "schedule_unit" },
    };
    rig r;
    probe_open(&r, "");
    CHECK(mil_trainer_create(r.model, "") == NULL);
    CHECK_CONTAINS(mil_error(r.ctx), "has one already");
    mil_trainer_free(r.trainer);
    for (int k = 0; k < (int)(sizeof wrong / sizeof *wrong); k++) {
        CHECK(mil_trainer_create(r.model, wrong[k][0]) == NULL);
        CHECK(mil_error_status(r.ctx) != MIL_OK);
        CHECK_CONTAINS(mil_error(r.ctx), wrong[k][1]);
    }
    r.trainer = mil_trainer_create(r.model, NULL);
    CHECK(r.trainer != NULL);
    CHECK(mil_trainer_step(r.trainer, NULL, NULL, NULL, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_trainer_step(NULL, NULL, NULL, NULL, NULL) == MIL_ERROR_ARGUMENT);
    CHECK(mil_trainer_create(NULL, "") == NULL);
    mil_trainer_free(NULL);
    rig_close(&r);
}

// Adam divides by the root of the mean square plus eps: 0 / 0 for a column that is always 0.
TEST(an_eps_of_zero_is_refused)
{
    static const char *const optimizers[] = { "adam", "adamw", "radam" };
    char options[64];
    rig r;
    probe_open(&r, "");
    mil_trainer_free(r.trainer);
    r.trainer = NULL;
    for (int k = 0; k < 3; k++)
        for (int small = 0; small < 2; small++) {
            snprintf(options, sizeof options, "optimizer=%s eps=%s", optimizers[k], small ? "1e-50" : "0");
            mil_trainer *t = mil_trainer_create(r.model, options);
            if (small && !MIL_REAL_IS_FLOAT) CHECK(t != NULL);                 // which in float is 0, too
            else {
                CHECK(t == NULL && mil_error_status(r.ctx) == MIL_ERROR_ARGUMENT);
                CHECK_CONTAINS(mil_error(r.ctx), small ? "eps=1e-50 is 0" : "eps=0 is 0");
            }
            mil_trainer_free(t);
        }
    rig_close(&r);
}

TEST(the_option_table_is_complete)
{
    int count = 0;
    const mil_option *table = mil_trainer_options(&count);
    CHECK(count > 30);
    for (int i = 0; i < count; i++) CHECK(table[i].name && table[i].value && table[i].doc && strlen(table[i].doc) > 2);
}

TEST(a_wrong_bag_leaves_the_trainer_usable)
{
    rig r, s;
    mil_real x[N] = { 0 };
    double values[2][N + COLS];
    probe_open(&r, "lr=0.1");
    probe_open(&s, "lr=0.1");
    mil_bag bag;
    memset(&bag, 0, sizeof bag);
    bag.features = mil_tensor_matrix(x, MIL_REAL_DTYPE, COLS, ROWS);
    const mil_target target = mil_target_class(0);
    for (int t = 0; t < 3; t++) {
        CHECK(mil_trainer_step(r.trainer, &bag, &target, NULL, NULL) == MIL_ERROR_ARGUMENT);
        CHECK_CONTAINS(mil_error(r.ctx), "takes width 3");
        CHECK(probe_step(&r, t, 0) == MIL_OK);
        CHECK(probe_step(&s, t, 0) == MIL_OK);
    }
    probe_values(&r, values[0]);
    probe_values(&s, values[1]);
    CHECK(memcmp(values[0], values[1], sizeof values[0]) == 0);
    rig_close(&r);
    rig_close(&s);
}

TEST(a_step_allocates_nothing_once_it_has_seen_the_bag)
{
    rig r;
    fill_bags(features, 8);
    CHECK(rig_open(&r, "abmil", SMALL_ABMIL, EVERYTHING, 1, 0));
    CHECK(abmil_step(&r, features, 0, NULL, NULL) == MIL_OK);                        // the largest bag
    CHECK(abmil_step(&r, features, 0, NULL, NULL) == MIL_OK);                        // and the first update
    const int64_t calls = r.memory.calls;
    const size_t bytes = mil_context_bytes(r.ctx);
    for (int t = 0; t < 20; t++) CHECK(abmil_step(&r, features, t, NULL, NULL) == MIL_OK);
    CHECK(mil_context_bytes(r.ctx) == bytes);
    CHECK(r.memory.calls == calls);
    rig_close(&r);
}

TEST(each_allocation_may_fail_and_the_step_be_tried_again)
{
    int64_t total = 0;
    fill_bags(features, 9);
    for (int64_t fail_at = 0; fail_at <= total; fail_at++) {
        rig r;
        const int opened = rig_open(&r, "abmil", SMALL_ABMIL, EVERYTHING, 1, fail_at);
        if (!opened) {                                     // a creation that failed leaves nothing behind
            if (r.ctx) CHECK(mil_error_status(r.ctx) == MIL_ERROR_NO_MEMORY);
            rig_close(&r);
            continue;
        }
        for (int t = 0; t < 4; t++) {
            mil_status status = abmil_step(&r, features, t, NULL, NULL);
            if (status != MIL_OK) {
                CHECK(status == MIL_ERROR_NO_MEMORY);
                status = abmil_step(&r, features, t, NULL, NULL);
            }
            CHECK(status == MIL_OK);
        }
        size_t size = 0;
        if (mil_trainer_save(r.trainer, NULL, &size) != MIL_OK) CHECK(mil_trainer_save(r.trainer, NULL, &size) == MIL_OK);
        char *bytes = (char *)malloc(size);
        if (mil_trainer_save(r.trainer, bytes, &size) != MIL_OK) CHECK(mil_trainer_save(r.trainer, bytes, &size) == MIL_OK);
        if (mil_trainer_restore(r.trainer, bytes, size) != MIL_OK) CHECK(mil_trainer_restore(r.trainer, bytes, size) == MIL_OK);
        CHECK(abmil_step(&r, features, 4, NULL, NULL) == MIL_OK || abmil_step(&r, features, 4, NULL, NULL) == MIL_OK);
        free(bytes);
        const int64_t n = weights_of(&r, weights[fail_at > 0], ROOM);
        if (fail_at) CHECK(memcmp(weights[0], weights[1], (size_t)n * sizeof(mil_real)) == 0);
        if (fail_at == 0) total = r.memory.calls + 2;
        rig_close(&r);
    }
    CHECK(total > 50);
}

TESTS(T(evaluating_gives_loss_and_logits_and_changes_nothing) T(a_target_weighs_its_bag)
      T(optimizers_equal_torch_after_twelve_steps) T(optimizers_equal_a_plain_loop_at_every_step) T(schedules_follow_their_formulas)
      T(the_rate_can_be_scaled_on_the_way) T(the_average_with_warmup_follows_its_decay) T(the_gradient_norm_is_that_before_clipping)
      T(summed_gradients_are_the_mean_times_the_count) T(flush_divides_the_last_group_by_its_own_size)
      T(a_parameter_without_a_gradient_is_left_alone_and_counts_its_own_updates) T(a_frozen_parameter_stays_and_thaws)
      T(buffers_are_updated_by_each_forward_pass) T(draws_can_be_supplied_for_a_step) T(a_small_model_learns)
      T(accumulated_bags_equal_one_batch) T(thread_counts_give_the_same_bits) T(a_restored_trainer_goes_on_with_the_same_bits)
      T(a_backend_with_memory_of_its_own_trains_alike) T(weights_of_absurd_size_stay_numbers_and_so_does_the_state) T(equal_targets_of_one_bag_name_the_first_class) T(a_state_before_the_first_update_holds_no_averages) T(a_state_that_does_not_fit_is_refused_and_changes_nothing) T(swapping_the_average_twice_gives_the_weights_back)
      T(a_loss_that_is_not_finite_updates_nothing) T(a_gradient_that_is_not_finite_is_dropped)
      T(bad_options_are_refused_with_a_sentence) T(the_option_table_is_complete) T(a_wrong_bag_leaves_the_trainer_usable)
      T(a_step_allocates_nothing_once_it_has_seen_the_bag) T(each_allocation_may_fail_and_the_step_be_tried_again)
      T(a_state_whose_counters_are_beyond_counting_is_refused) T(weights_are_not_written_while_the_average_is_swapped_in)
      T(a_fresh_head_is_fresh_until_the_first_update) T(a_factor_that_is_no_rate_leaves_the_rate) T(an_eps_of_zero_is_refused))
