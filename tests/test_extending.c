// build: float double
// The worked examples of >>extending: they stand in mil.h as comments, line for line as here, and do what is said there.
#include <stddef.h>
#include <stdlib.h>
#include "mil.h"
#include "check.h"

// [example: an op]
// snake(x) = x + sin(a x)^2 / a, element by element (Ziyin et al. 2020), and its gradient dy (1 + sin(2 a x)), an op, too.
static void snake_run(const mil_exec *x)
{
    const mil_real *in = (const mil_real *)x->in[0];       // first row of the block, as it is with x->out
    mil_real *out = (mil_real *)x->out;
    const double a = x->node->r[0];
    for (int64_t i = 0; i < x->rows * x->node->cols; i++) {
        const double s = sin(a * (double)in[i]);
        out[i] = (mil_real)((double)in[i] + s * s / a);
    }
}

static void snake_grad_run(const mil_exec *x)
{
    const mil_real *in = (const mil_real *)x->in[0], *dy = (const mil_real *)x->in[1];
    for (int64_t i = 0; i < x->rows * x->node->cols; i++)
        ((mil_real *)x->out)[i] = (mil_real)((double)dy[i] * (1 + sin(2 * x->node->r[0] * (double)in[i])));
}

static mil_node *snake_record(const mil_op *op, mil_node *x, mil_node *dy, double a)
{
    if (!x) return NULL;                                   // an earlier op failed; the tape knows
    mil_spec s = mil_spec_make(op, MIL_KIND_ROWS, x->rank, x->shape);
    s.input_count = dy ? 2 : 1;
    s.input[0] = x;
    s.input[1] = dy;
    s.row_inputs = dy ? 3 : 1;                             // every input is cut into rows like the result
    s.r[0] = a;
    return mil_record(x->tape, &s);
}

static const mil_op snake_grad_op = MIL_OP_ROWS("gradient of snake", snake_grad_run, NULL);
static void snake_grad(mil_node *n, mil_node *dy)
{
    mil_add_grad(n->input[0], snake_record(&snake_grad_op, n->input[0], dy, n->r[0]));
}
static const mil_op snake_op = MIL_OP_ROWS("snake", snake_run, snake_grad);
static mil_node *snake(mil_node *x, double a) { return snake_record(&snake_op, x, NULL, a); }
// [end]

// [example: a model]
// Mean pooling: h = snake(W x + b), z = mean_n h_n, logits = C z + c.
typedef struct { int64_t in_dim, num_classes, width; } my_config;
typedef struct { mil_linear_layer embed, classifier; } my_layers;

static const mil_option my_options[] = {
    { "in_dim",      MIL_OPTION_INT, offsetof(my_config, in_dim),      "1024", "1..1000000", "width of an instance" },
    { "num_classes", MIL_OPTION_INT, offsetof(my_config, num_classes), "2",    "1..1000000", "classes" },
    { "width",       MIL_OPTION_INT, offsetof(my_config, width),       "64",   "1..1000000", "width of the hidden layer" }
};
static const mil_config my_configs[] = { { "base", "" }, { "wide", "width=256" } };

static void my_declare(mil_builder *b, void *layers, const void *config)
{
    my_layers *m = (my_layers *)layers;
    const my_config *c = (const my_config *)config;
    m->embed = mil_declare_linear(b, c->in_dim, c->width, 1, MIL_LINEAR_TORCH, "embed");           // embed.weight, embed.bias
    m->classifier = mil_declare_linear(b, c->width, c->num_classes, 1, MIL_LINEAR_TORCH, "classifier");
}

static void my_forward(const void *layers, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const my_layers *m = (const my_layers *)layers;
    (void)config;
    mil_node *h = snake(mil_linear_forward(&m->embed, in->features), 1);                           // [B, N, width]
    out->slide_feats = mil_squeeze(mil_mean(h, 1), 1);                                             // [B, width]
    out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                            // [B, C]
#ifndef MIL_NO_TRAINING
    if (in->target) out->loss = mil_loss_node(out->logits, in->target);
#endif
}

static const mil_architecture my_model = {
    "mymean", "mean pooling over snake features", "this comment", "model.", my_options, 3, sizeof(my_config), my_configs, 2,
    sizeof(my_layers), "classifier", MIL_MODEL_BATCHES, my_declare, my_forward
};
// then: mil_register(ctx, &my_model); model = mil_create(ctx, "mymean.wide", "in_dim=512 num_classes=3");
// [end]

TEST(the_example_model_with_the_example_op_trains_saves_and_streams)
{
    enum { N = 300, D = 6 };
    mil_context *ctx = NULL;
    float v[N * D];
    double loss = 0, first = 0;
    mil_real whole[2], pieces[2];
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_register(ctx, &my_model) == MIL_OK);
    mil_model *model = mil_create(ctx, "mymean", "in_dim=6 width=5");
    mil_trainer *trainer = mil_trainer_create(model, "lr=0.01");
    if (!CHECK(model && trainer)) { puts(mil_error(ctx)); return; }
    for (int i = 0; i < N * D; i++) v[i] = (float)((i * 37 + 11) % 101) / 50 - 1;
    const mil_bag bag = mil_bag_make(v, N, D);
    const mil_target target = mil_target_class(1);
    for (int k = 0; k < 30; k++) {
        if (!CHECK(mil_trainer_step(trainer, &bag, &target, &loss, NULL) == MIL_OK)) { puts(mil_error(ctx)); break; }
        if (k == 0) first = loss;
    }
    CHECK(loss < first);
    size_t size = 0;
    CHECK(mil_save_memory(model, NULL, &size) == MIL_OK);
    char *bytes = (char *)malloc(size);
    CHECK(mil_save_memory(model, bytes, &size) == MIL_OK);
    mil_model *opened = mil_open_memory(ctx, bytes, size);
    mil_scorer *scorer = mil_scorer_create(model, NULL), *other = mil_scorer_create(opened, NULL);
    if (CHECK(opened && scorer && other)) {
        CHECK(mil_scorer_score(scorer, &bag) == MIL_OK && mil_scorer_read(scorer, MIL_LOGITS, whole, 2) == MIL_OK);
        CHECK(mil_scorer_push(other, v, 7, 0, MIL_F32) == MIL_OK && mil_scorer_push(other, v + 7 * D, N - 7, 0, MIL_F32) == MIL_OK);
        CHECK(mil_scorer_read(other, MIL_LOGITS, pieces, 2) == MIL_OK);
        CHECK_NEAR(pieces[0], whole[0], 1e-6);
        CHECK_NEAR(pieces[1], whole[1], 1e-6);
    }
    free(bytes);
    mil_scorer_free(scorer);
    mil_scorer_free(other);
    mil_model_free(opened);
    mil_trainer_free(trainer);
    mil_model_free(model);
    mil_context_free(ctx);
}

TEST(the_example_ops_gradient_is_its_slope)
{
    mil_context *ctx = NULL;
    mil_tape *tape = NULL;
    enum { N = 300 };
    static mil_real v[N], g[N];
    for (int i = 0; i < N; i++) v[i] = (mil_real)(i - 150) / 40;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
    const mil_tensor t = mil_tensor_matrix(v, MIL_REAL_DTYPE, N, 1);
    mil_node *x = mil_input(tape, "x", &t);
    mil_node_want_grad(x);
    CHECK(mil_tape_backward(tape, mil_sum_all(snake(x, 1.7))) == MIL_OK);
    mil_node_keep(mil_node_grad(x));
    CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(mil_node_grad(x), g, N) == MIL_OK);
    for (int i = 0; i < N; i++) {
        const double a = (double)v[i] + 1e-4, b = (double)v[i] - 1e-4;
        CHECK_NEAR(g[i], (a + sin(1.7 * a) * sin(1.7 * a) / 1.7 - b - sin(1.7 * b) * sin(1.7 * b) / 1.7) / 2e-4, 1e-6);
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(a_shuffle_is_an_order_that_seed_and_epoch_give)
{
    int64_t a[100], b[100], c[100], seen = 0;
    char had[100] = { 0 };
    mil_shuffle(3, 0, 100, a);
    mil_shuffle(3, 0, 100, b);
    mil_shuffle(3, 1, 100, c);
    mil_shuffle(3, 1, 0, NULL);
    for (int i = 0; i < 100; i++) if (a[i] >= 0 && a[i] < 100 && !had[a[i]]) { had[a[i]] = 1; seen++; }
    CHECK(seen == 100 && memcmp(a, b, sizeof a) == 0 && memcmp(a, c, sizeof a) != 0);
}

TEST(encoders_are_listed)
{
    CHECK(mil_encoder_count() > 5 && !mil_encoder_at(-1) && !mil_encoder_at(mil_encoder_count()));
    for (int64_t i = 0; i < mil_encoder_count(); i++) CHECK(mil_encoder_dim(mil_encoder_at(i)) > 0);
}

// Reads on to the line that holds `mark`. 0: there is none.
static int find_line(FILE *f, const char *mark)
{
    char line[512];
    while (fgets(line, sizeof line, f)) if (strncmp(line, "// [", 4) == 0 && strstr(line, mark)) return 1;
    return 0;
}

TEST(the_examples_stand_in_the_header_as_they_stand_here)
{
    static const char *const marks[] = { "[example: an op]", "[example: a model]" };
    FILE *header = fopen("mil.h", "rb"), *here = fopen("tests/test_extending.c", "rb");
    char a[512], b[512];
    for (int k = 0; header && here && k < 2; k++) {
        if (!CHECK(find_line(header, marks[k]) && find_line(here, marks[k]))) break;
        for (int n = 0; fgets(a, sizeof a, here) && fgets(b, sizeof b, header); n++) {
            if (strcmp(a, "// [end]\n") == 0 && CHECK(strcmp(b, a) == 0 && n > 10)) break;
            if (!CHECK_STRING(strcmp(b, "//\n") == 0 ? "\n" : strncmp(b, "//     ", 7) == 0 ? b + 7 : b, a)) break;
        }
    }
    if (header) fclose(header);
    if (here) fclose(here);
}

TESTS(T(a_shuffle_is_an_order_that_seed_and_epoch_give) T(encoders_are_listed) T(the_example_model_with_the_example_op_trains_saves_and_streams) T(the_example_ops_gradient_is_its_slope)
      T(the_examples_stand_in_the_header_as_they_stand_here))
