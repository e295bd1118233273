// Cases of single functions (`fn.<name>`): each reads its inputs and config from the case and compares what the library gives.
// Included by parity.h, which has the helpers; a new case is a function and a row at the end.
#ifndef TOOL_PARITY_FN_H
#define TOOL_PARITY_FN_H

// ---- metrics: torchmetrics' definitions --------------------------------------------------------------------------
typedef struct fn_bags { int64_t n, C, *labels; double *scores, *logits; int binary; } fn_bags;

// Labels and scores of a case: softmax of the logits (as they are when all lie in 0..1); binary metrics: the second logit, through
// the sigmoid when any lies outside 0..1.
static fn_bags fn_bags_make(const replay *r)
{
    const mil_tensor *logits = mil_tensors_get(r->file, "in.logits"), *labels = mil_tensors_get(r->file, "in.labels");
    const json *binary = json_get(r->config, "bin_metric");
    fn_bags b;
    int outside = 0;
    memset(&b, 0, sizeof b);
    b.n = labels ? mil_tensor_count(labels) : 0;
    b.C = b.n && logits ? mil_tensor_count(logits) / b.n : 0;
    b.binary = binary && binary->type == 't';
    b.labels = TOOL_NEW(int64_t, b.n);
    b.logits = TOOL_NEW(double, b.n * b.C);
    b.scores = TOOL_NEW(double, b.n * b.C);
    for (int64_t i = 0; i < b.n; i++) b.labels[i] = (int64_t)tensor_value(labels, i);
    for (int64_t i = 0; i < b.n * b.C; i++) b.logits[i] = tensor_value(logits, i);
    for (int64_t i = 0; i < b.n; i++)
        for (int64_t c = b.binary ? 1 : 0; c < b.C; c++) outside |= !(b.logits[i * b.C + c] >= 0 && b.logits[i * b.C + c] <= 1);
    for (int64_t i = 0; i < b.n; i++) {
        double sum = 0, top = -(double)INFINITY;
        const double *x = b.logits + i * b.C;
        if (b.binary) {
            b.scores[i] = outside ? 1 / (1 + exp(-x[1])) : x[1];
            continue;
        }
        for (int64_t c = 0; c < b.C; c++) if (x[c] > top) top = x[c];
        for (int64_t c = 0; c < b.C; c++) sum += exp(x[c] - top);
        for (int64_t c = 0; c < b.C; c++) b.scores[i * b.C + c] = outside ? exp(x[c] - top) / sum : x[c];
    }
    return b;
}

static void fn_bags_free(fn_bags *b)
{
    free(b->labels); free(b->scores); free(b->logits);
}

enum { FN_ACCURACY, FN_ACCURACY_MICRO, FN_AUC, FN_PRECISION, FN_RECALL, FN_F1, FN_KAPPA, FN_METRICS };

// One of these metrics on the bags `indices` (NULL: all).
static double fn_metric(mil_context *ctx, const fn_bags *b, int which, const int64_t *indices)
{
    const int64_t C = b->C, S = b->binary ? 1 : C;
    double value = (double)NAN, *scores = TOOL_NEW(double, b->n * S), *logits = TOOL_NEW(double, b->n * S), *per_class = TOOL_NEW(double, C);
    int64_t *labels = TOOL_NEW(int64_t, b->n), *predicted = TOOL_NEW(int64_t, b->n), *confusion = TOOL_NEW(int64_t, C * C);
    for (int64_t i = 0; i < b->n; i++) {
        const int64_t k = indices ? indices[i] : i;
        labels[i] = b->labels[k];
        for (int64_t c = 0; c < S; c++) {
            scores[i * S + c] = b->scores[k * S + c];
            logits[i * S + c] = b->binary ? b->scores[k] : b->logits[k * C + c];
        }
    }
    mil_status status = mil_metric_predict(ctx, logits, b->n, S, predicted);       // by logits: the softmax may round them equal
    if (status == MIL_OK) status = mil_metric_confusion(ctx, predicted, labels, b->n, C, confusion);
    if (status == MIL_OK) switch (which) {
    case FN_AUC:
        if (b->binary) {
            status = mil_metric_auroc(ctx, scores, labels, b->n, &value);
            if (isnan(value)) value = 0;
        } else {
            status = mil_metric_auroc_ovr(ctx, scores, labels, b->n, C, MIL_AVERAGE_MACRO, per_class, &value);
            value = 0;                                     // there a class without bags counts as 0; here it is left out
            for (int64_t c = 0; c < C; c++) value += isnan(per_class[c]) ? 0 : per_class[c] / (double)C;
        }
        break;
    case FN_ACCURACY:
        status = b->binary ? mil_metric_accuracy(ctx, confusion, C, &value) : mil_metric_recall(ctx, confusion, C, MIL_AVERAGE_MACRO, NULL, &value);
        break;
    case FN_ACCURACY_MICRO: status = mil_metric_accuracy(ctx, confusion, C, &value); break;
    case FN_KAPPA: status = mil_metric_kappa(ctx, confusion, C, MIL_KAPPA_UNWEIGHTED, &value); break;
    default:
        status = which == FN_PRECISION ? mil_metric_precision(ctx, confusion, C, MIL_AVERAGE_MACRO, per_class, &value)
               : which == FN_RECALL ? mil_metric_recall(ctx, confusion, C, MIL_AVERAGE_MACRO, per_class, &value)
                                    : mil_metric_f1(ctx, confusion, C, MIL_AVERAGE_MACRO, per_class, &value);
        if (b->binary) value = isnan(per_class[1]) ? 0 : per_class[1];
    }
    if (status != MIL_OK) value = (double)NAN;
    free(scores); free(logits); free(per_class); free(labels); free(predicted); free(confusion);
    return value;
}

static void fn_one_metric(replay *r, int which)
{
    fn_bags b = fn_bags_make(r);
    const double value = fn_metric(r->ctx, &b, which, NULL);
    replay_out(r, "out.value", &value, 1);
    fn_bags_free(&b);
}

static void fn_accuracy(replay *r) { fn_one_metric(r, strcmp(json_text(r->config, "average", "macro"), "micro") == 0 ? FN_ACCURACY_MICRO : FN_ACCURACY); }
static void fn_auc(replay *r) { fn_one_metric(r, FN_AUC); }
static void fn_precision(replay *r) { fn_one_metric(r, FN_PRECISION); }
static void fn_recall(replay *r) { fn_one_metric(r, FN_RECALL); }
static void fn_f1(replay *r) { fn_one_metric(r, FN_F1); }
static void fn_kappa(replay *r) { fn_one_metric(r, FN_KAPPA); }

static double *fn_doubles(const replay *r, const char *name, int64_t *n)
{
    const mil_tensor *t = mil_tensors_get(r->file, name);
    *n = t ? mil_tensor_count(t) : 0;
    double *x = TOOL_NEW(double, *n);
    for (int64_t i = 0; i < *n; i++) x[i] = tensor_value(t, i);
    return x;
}

static int64_t *fn_integers(const replay *r, const char *name, int64_t *n)
{
    double *x = fn_doubles(r, name, n);
    int64_t *y = TOOL_NEW(int64_t, *n);
    for (int64_t i = 0; i < *n; i++) y[i] = replay_integer(x[i]);
    free(x);
    return y;
}

static void fn_cindex(replay *r)
{
    int64_t n;
    double *risk = fn_doubles(r, "in.risk", &n), *time = fn_doubles(r, "in.time", &n);
    int64_t *event = fn_integers(r, "in.event", &n);
    mil_cindex c;
    if (mil_metric_cindex(r->ctx, risk, time, event, n, json_number(r->config, "tied_tol", 1e-8), &c) != MIL_OK) replay_fail(r, "(%s)", mil_error(r->ctx));
    replay_out(r, "out.cindex", &c.value, 1);
    replay_out_integers(r, "out.concordant", &c.concordant, 1);
    replay_out_integers(r, "out.discordant", &c.discordant, 1);
    replay_out_integers(r, "out.tied_risk", &c.tied_risk, 1);
    replay_out_integers(r, "out.tied_time", &c.tied_time, 1);
    free(risk); free(time); free(event);
}

typedef struct fn_resampled { const fn_bags *bags; int which; } fn_resampled;
static mil_status fn_resampled_metric(mil_context *ctx, void *user, const int64_t *indices, int64_t n, double *value)
{
    const fn_resampled *f = (const fn_resampled *)user;
    (void)n;
    *value = fn_metric(ctx, f->bags, f->which, indices);
    return MIL_OK;
}

static void fn_bootstrap(replay *r)
{
    static const char *const names[FN_METRICS] = { "accuracy", "accuracy_micro", "auc", "precision", "recall", "f1", "kappa" };
    const json *survival = json_get(r->config, "surv");
    mil_bootstrap_options o = mil_bootstrap_default();
    mil_interval v;
    int64_t n, draws, *indices = fn_integers(r, "in.rand.indices", &draws);
    o.indices = indices;
    o.resamples = (int64_t)json_number(r->config, "num_bootstrap", 1);
    if (survival && survival->type == 't') {
        double *risk = fn_doubles(r, "in.risk", &n), *time = fn_doubles(r, "in.time", &n);
        int64_t *event = fn_integers(r, "in.event", &n);
        if (mil_cindex_bootstrap(r->ctx, risk, time, event, n, 1e-8, &o, &v) != MIL_OK) replay_fail(r, "(%s)", mil_error(r->ctx));
        replay_out(r, "out.cindex_mean", &v.mean, 1);
        replay_out(r, "out.cindex_std", &v.std, 1);
        free(risk); free(time); free(event);
    } else {
        fn_bags b = fn_bags_make(r);
        for (int k = 0; k < FN_METRICS; k++) {
            fn_resampled f = { &b, k };
            char *mean = tool_format("out.%s_mean", names[k]), *deviation = tool_format("out.%s_std", names[k]);
            if (mil_bootstrap(r->ctx, fn_resampled_metric, &f, NULL, b.n, 0, &o, &v) != MIL_OK) replay_fail(r, "(%s)", mil_error(r->ctx));
            replay_out(r, mean, &v.mean, 1);
            replay_out(r, deviation, &v.std, 1);
            free(mean);
            free(deviation);
        }
        fn_bags_free(&b);
    }
    free(indices);
}

// ---- losses ------------------------------------------------------------------------------------------------------
// loss NULL: the recording failed. Compares it, and the gradient by the logits.
static void fn_loss(replay *r, mil_tape *tape, mil_node *logits, mil_node *loss)
{
    const mil_tensor *value = mil_tensors_get(r->file, "out.loss"), *gradient = mil_tensors_get(r->file, "grad.in.logits");
    mil_node_keep(loss);
    if (gradient && loss) mil_tape_backward(tape, loss);
    mil_node *dx = gradient ? mil_node_grad(logits) : NULL;
    mil_node_keep(dx);
    if (mil_tape_run(tape) != MIL_OK) replay_fail(r, "(%s)", mil_error(r->ctx));
    else {
        if (value) replay_compare_node(r, "out.loss", value, loss, 1e-4);
        if (gradient && dx) replay_compare_node(r, "grad.in.logits", gradient, dx, 1e-3);
    }
}

static void fn_tape_loss(replay *r, int kind)              // 0: ce, 1: bce, 2: bce_pos_weight
{
    const mil_tensor *x = mil_tensors_get(r->file, "in.logits"), *y = mil_tensors_get(r->file, kind == 0 ? "in.labels" : kind == 1 ? "in.targets" : "in.target");
    mil_tape *tape = NULL;
    if (!x || !y || mil_tape_create(r->ctx, &tape) != MIL_OK) {
        replay_fail(r, "(no logits or targets)");
        return;
    }
    mil_real *memory;
    const mil_tensor real = replay_real(x, &memory);
    mil_node *logits = mil_input(tape, "logits", &real), *target = mil_input(tape, "target", y);
    mil_node_want_grad(logits);
    fn_loss(r, tape, logits, kind == 0 ? mil_cross_entropy(logits, target, NULL, 0) : mil_bce_with_logits(logits, target, kind == 2 ? json_number(r->config, "pos_weight", 1) : 1));
    mil_tape_free(tape);
    free(memory);
}

static void fn_ce(replay *r) { fn_tape_loss(r, 0); }
static void fn_bce(replay *r) { fn_tape_loss(r, 1); }
static void fn_bce_pos_weight(replay *r) { fn_tape_loss(r, 2); }

// ---- synthetic bags ----------------------------------------------------------------------------------------------
static double fn_draw(void *user, int noise, int64_t index) { return replay_input((const replay *)user, noise ? "in.rand.noise" : "in.rand.int", index); }

static void fn_unit_bags(replay *r, unit_kind kind)
{
    unit_draws draws = { 0, 0, fn_draw, r };
    const json *train = json_get(r->config, "train");
    unit_bags u = unit_make(kind, (int64_t)json_number(r->config, "D", 1), (int64_t)json_number(r->config, "num_bags", 0),
                            (int64_t)json_number(r->config, "B", 0), json_number(r->config, "pos_class_prob", 0.5), train && train->type == 't', &draws);
    replay_out(r, "out.X", u.x, u.rows * u.D);
    replay_out(r, "out.y_inst", u.y_inst, u.rows);
    replay_out_integers(r, "out.Y", u.y, u.bags);
    replay_out_integers(r, "out.sizes", u.sizes, u.bags);
    unit_free(&u);
}

static void fn_sc_standard(replay *r) { fn_unit_bags(r, UNIT_SC_STANDARD); }
static void fn_mc_standard(replay *r) { fn_unit_bags(r, UNIT_MC_STANDARD); }
static void fn_false_frequency(replay *r) { fn_unit_bags(r, UNIT_FALSE_FREQUENCY); }

static const replay_function replay_functions[] = {
    { "accuracy", fn_accuracy }, { "auc", fn_auc }, { "precision", fn_precision }, { "recall", fn_recall }, { "f1", fn_f1 }, { "kappa", fn_kappa },
    { "cindex", fn_cindex }, { "bootstrap", fn_bootstrap }, { "ce", fn_ce }, { "bce", fn_bce }, { "bce_pos_weight", fn_bce_pos_weight },
    { "sc_standard", fn_sc_standard }, { "mc_standard", fn_mc_standard }, { "false_frequency", fn_false_frequency },
    { NULL, NULL }
};
#endif
