// build: float
// Hostile checkpoints, options and names: each breaks one rule and is refused with a sentence that names it; nothing is
// half-changed, and no memory is taken that the file's own size does not justify. The formats' rules are in test_files.
#include <stdlib.h>
#include "mil.h"
#include "check.h"

static size_t live, peak;

static void *counting(void *user, void *block, size_t old_size, size_t new_size)
{
    (void)user;
    if (new_size == 0) {
        live -= block ? old_size : 0;
        free(block);
        return NULL;
    }
    void *p = realloc(block, new_size);
    if (p) live += new_size - (block ? old_size : 0);
    if (live > peak) peak = live;
    return p;
}

static mil_context *make_context(void)
{
    mil_context *ctx = NULL;
    mil_context_options options = mil_context_options_default();
    options.allocator.reallocate = counting;
    options.threads = 1;
    CHECK(mil_context_create(&ctx, &options) == MIL_OK);
    return ctx;
}

static void end_context(mil_context *ctx)
{
    mil_context_free(ctx);
    CHECK(live == 0);
}

// ---- a small model as a file, built by hand ----
#define SMALL "in_dim=4 embed_dim=3 attn_dim=2"
#define CONFIG "{\\\"in_dim\\\":4,\\\"num_classes\\\":2,\\\"embed_dim\\\":3,\\\"attn_dim\\\":2,\\\"num_fc_layers\\\":1,\\\"gate\\\":true,\\\"dropout\\\":0.25}"

typedef struct entry { const char *key, *shape; int count; } entry;
static const entry entries[] = {
    { "patch_embed.0.weight", "[3,4]", 12 }, { "patch_embed.0.bias", "[3]", 3 },
    { "global_attn.attention_a.0.weight", "[2,3]", 6 }, { "global_attn.attention_a.0.bias", "[2]", 2 },
    { "global_attn.attention_b.0.weight", "[2,3]", 6 }, { "global_attn.attention_b.0.bias", "[2]", 2 },
    { "global_attn.attention_c.weight", "[1,2]", 2 }, { "global_attn.attention_c.bias", "[1]", 1 },
    { "classifier.weight", "[2,3]", 6 }, { "classifier.bias", "[2]", 2 } };
enum { ENTRIES = sizeof entries / sizeof *entries };

// What is done to it: metadata as text, one entry left out (-1: none), one added (NULL: none), the value of every element.
typedef struct recipe { const char *meta; int without; const entry *added; float value; const char *prefix; } recipe;

static unsigned char *make_file(const recipe *r, size_t *size)
{
    static char header[8192];
    size_t n = 0, data = 0;
    n += (size_t)snprintf(header + n, sizeof header - n, "{%s%s", r->meta ? r->meta : "", r->meta ? "," : "");
    for (int i = 0, first = 1; i <= ENTRIES; i++) {
        const entry *e = i < ENTRIES ? &entries[i] : r->added;
        if (!e || i == r->without) continue;
        n += (size_t)snprintf(header + n, sizeof header - n, "%s\"%s%s\":{\"dtype\":\"F32\",\"shape\":%s,\"data_offsets\":[%d,%d]}", first ? "" : ",",
                              r->prefix ? r->prefix : "model.", e->key, e->shape, (int)data, (int)data + 4 * e->count);
        data += 4 * (size_t)e->count;
        first = 0;
    }
    n += (size_t)snprintf(header + n, sizeof header - n, "}");
    unsigned char *bytes = (unsigned char *)malloc(8 + n + data);
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(bytes + 8, header, n);
    for (size_t i = 0; i < data / 4; i++) {
        const float v = r->value != 0 ? r->value : (float)((int)(i * 7 % 13) - 6) / 8;
        uint32_t u;
        memcpy(&u, &v, 4);
        for (int k = 0; k < 4; k++) bytes[8 + n + 4 * i + (size_t)k] = (unsigned char)(u >> (8 * k));
    }
    *size = 8 + n + data;
    return bytes;
}

static int score(mil_model *model, mil_real logits[2])
{
    float x[12];
    for (int i = 0; i < 12; i++) x[i] = (float)(i % 5) - 2;
    const mil_bag bag = mil_bag_make(x, 3, 4);
    mil_scorer *scorer = mil_scorer_create(model, NULL);
    const int ok = scorer && mil_scorer_score(scorer, &bag) == MIL_OK && mil_scorer_read(scorer, MIL_LOGITS, logits, 2) == MIL_OK;
    mil_scorer_free(scorer);
    return ok;
}

TEST(checkpoints_with_broken_descriptions_are_refused_by_name)
{
    static const entry more = { "mystery", "[2]", 2 }, twice = { "model.classifier.bias", "[2]", 2 };
    static const struct { recipe r; mil_status status; const char *sentence; } cases[] = {
        { { "\"__metadata__\":{\"mil.model\":\"abmil.base.uni.none\",\"mil.config\":\"" CONFIG "\"}", -1, NULL, 0, NULL }, MIL_OK, "" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\"}", -1, NULL, 0, "" }, MIL_OK, "" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\"}", -1, NULL, 0, "module." }, MIL_OK, "" },
        { { NULL, -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "does not say which model" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\"}", -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "does not say which model" },
        { { "\"__metadata__\":{\"mil.config\":\"" CONFIG "\"}", -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "does not say which model" },
        { { "\"__metadata__\":{\"mil.model\":\"\",\"mil.config\":\"{}\"}", -1, NULL, 0, NULL }, MIL_ERROR_UNKNOWN, "model name" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil.\",\"mil.config\":\"{}\"}", -1, NULL, 0, NULL }, MIL_ERROR_UNKNOWN, "none empty" },
        { { "\"__metadata__\":{\"mil.model\":\"a.b.c.d.e\",\"mil.config\":\"{}\"}", -1, NULL, 0, NULL }, MIL_ERROR_UNKNOWN, "four parts" },
        { { "\"__metadata__\":{\"mil.model\":\"abnil\",\"mil.config\":\"{}\"}", -1, NULL, 0, NULL }, MIL_ERROR_UNKNOWN, "did you mean \"abmil\"" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil.bass\",\"mil.config\":\"{}\"}", -1, NULL, 0, NULL }, MIL_ERROR_UNKNOWN, "\"base\"" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil.base.uno\",\"mil.config\":\"{}\"}", -1, NULL, 0, NULL }, MIL_ERROR_UNKNOWN, "no encoder \"uno\"" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"\"}", -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "JSON" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"[]\"}", -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "not an object" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"{\\\"in_dim\\\":4,\\\"in_dim\\\":5}\"}", -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "twice" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"{\\\"in_dims\\\":4}\"}", -1, NULL, 0, NULL }, MIL_ERROR_UNKNOWN, "no option \"in_dims\"" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"{\\\"in_dim\\\":-4}\"}", -1, NULL, 0, NULL }, MIL_ERROR_ARGUMENT, "expected a whole number (" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"{\\\"in_dim\\\":4.5}\"}", -1, NULL, 0, NULL }, MIL_ERROR_ARGUMENT, "whole number" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"{\\\"in_dim\\\":{}}\"}", -1, NULL, 0, NULL }, MIL_ERROR_ARGUMENT, "whole number" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"{\\\"in_dim\\\":16000,\\\"embed_dim\\\":16000}\"}", -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "justify" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"{\\\"in_dim\\\":9223372036854775808}\"}", -1, NULL, 0, NULL }, MIL_ERROR_ARGUMENT, "whole number" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\",\"mil.classes\":\"{}\"}", -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "mil.classes" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\",\"mil.classes\":\"[1,2]\"}", -1, NULL, 0, NULL }, MIL_ERROR_FORMAT, "mil.classes" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\",\"mil.classes\":\"[\\\"a\\\"]\"}", -1, NULL, 0, NULL }, MIL_ERROR_ARGUMENT, "1 names for 2" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\"}", 0, NULL, 0, NULL }, MIL_ERROR_UNKNOWN, "missing patch_embed.0.weight" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\"}", -1, &more, 0, NULL }, MIL_ERROR_UNKNOWN, "model.mystery" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\"}", -1, &twice, 0, NULL }, MIL_ERROR_FORMAT, "are both classifier.bias" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"{\\\"in_dim\\\":5,\\\"embed_dim\\\":3,\\\"attn_dim\\\":2}\"}", -1, NULL, 0, NULL }, MIL_ERROR_SHAPE, "[3, 5]" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\"}", -1, NULL, (float)NAN, NULL }, MIL_ERROR_NUMERIC, "NaN" },
        { { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\"}", -1, NULL, (float)INFINITY, NULL }, MIL_ERROR_NUMERIC, "infinity" } };
    mil_context *ctx = make_context();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t size;
        unsigned char *bytes = make_file(&cases[i].r, &size);
        const size_t before = live;
        mil_real logits[2];
        peak = live;
        mil_model *model = mil_open_memory(ctx, bytes, size);
        if (!CHECK(mil_error_status(ctx) == cases[i].status && (model != NULL) == (cases[i].status == MIL_OK)))
            printf("  case %d (%s): %s %s\n", (int)i, cases[i].r.meta ? cases[i].r.meta : "", mil_status_name(mil_error_status(ctx)), mil_error(ctx));
        CHECK(peak - before < 64 * size + 131072);
        if (!model) CHECK_CONTAINS(mil_error(ctx), cases[i].sentence);
        else CHECK(score(model, logits));
        mil_model_free(model);
        CHECK(live == before);
        free(bytes);
    }
    end_context(ctx);
}

TEST(a_load_that_fails_changes_no_bit_of_the_model)
{
    static const entry more = { "mystery", "[2]", 2 };
    static const recipe bad[] = { { NULL, 3, NULL, 1, NULL }, { NULL, -1, &more, 1, NULL }, { NULL, -1, NULL, (float)NAN, NULL } };
    mil_context *ctx = make_context();
    mil_model *model = mil_create(ctx, "abmil", SMALL);
    mil_real before[2], after[2];
    size_t size;
    if (!CHECK(model != NULL)) return;
    CHECK(score(model, before));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        unsigned char *bytes = make_file(&bad[i], &size);
        CHECK(mil_load_memory(model, bytes, size, NULL) != MIL_OK && mil_error(ctx)[0]);
        CHECK(score(model, after) && memcmp(before, after, sizeof before) == 0);
        free(bytes);
    }
    const recipe good = { NULL, -1, NULL, 0, NULL };       // cut anywhere, it is refused; whole, it is taken
    unsigned char *bytes = make_file(&good, &size);
    for (size_t n = 0; n < size; n++) {
        unsigned char *cut = (unsigned char *)malloc(n + 1);
        memcpy(cut, bytes, n);
        if (!CHECK(mil_load_memory(model, cut, n, NULL) == MIL_ERROR_FORMAT)) printf("  cut at %d\n", (int)n);
        free(cut);
    }
    CHECK(score(model, after) && memcmp(before, after, sizeof before) == 0);
    CHECK(mil_load_memory(model, bytes, size, NULL) == MIL_OK && score(model, after) && memcmp(before, after, sizeof before) != 0);
    free(bytes);
    mil_model_free(model);
    end_context(ctx);
}

TEST(a_damaged_checkpoint_is_refused_or_scores)
{
    const recipe good = { "\"__metadata__\":{\"mil.model\":\"abmil\",\"mil.config\":\"" CONFIG "\"}", -1, NULL, 0, NULL };
    mil_context *ctx = make_context();
    size_t size;
    unsigned char *bytes = make_file(&good, &size), *damaged = (unsigned char *)malloc(size);
    uint64_t state = 7;
    int opened = 0;
    for (int trial = 0; trial < 3000; trial++) {
        memcpy(damaged, bytes, size);
        for (int k = 0; k < 1 + trial % 3; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            damaged[(state >> 20) % size] = (unsigned char)(state >> 50);
        }
        mil_model *model = mil_open_memory(ctx, damaged, size);
        CHECK((model != NULL) == (mil_error_status(ctx) == MIL_OK) && (model != NULL) == !mil_error(ctx)[0]);
        mil_real logits[2];
        if (model) opened += score(model, logits) || 1;
        mil_model_free(model);
    }
    CHECK(opened > 0 && opened < 3000);
    free(damaged);
    free(bytes);
    end_context(ctx);
}

TEST(options_that_break_a_rule_are_named)
{
    static const struct { const char *name, *options; mil_status status; const char *sentence; } cases[] = {
        { "abmil", NULL, MIL_OK, "" },
        { "abmil", "", MIL_OK, "" },
        { "abmil", " \n\t, ", MIL_OK, "" },
        { "abmil.base", "in_dim=4,embed_dim=2\nattn_dim=2\tgate=True", MIL_OK, "" },
        { "abmil", "{\"in_dim\":4,\"embed_dim\":2,\"attn_dim\":2,\"gate\":false}", MIL_OK, "" },
        { "abmil", " {\"in_dim\":4,\"embed_dim\":2,\"attn_dim\":2} ", MIL_OK, "" },
        { "abmil", "in_dim=4 in_dim=5", MIL_OK, "" },
        { "abmil", "dropout=1e-1", MIL_OK, "" },
        { "abmil", "dropout=.5", MIL_ERROR_ARGUMENT, "a number" },
        { "abmil", "dropout=1.5", MIL_ERROR_ARGUMENT, "0..1" },
        { "abmil", "dropout=nan", MIL_ERROR_ARGUMENT, "a number" },
        { "abmil", "dropout=1e999", MIL_ERROR_ARGUMENT, "a number" },
        { "abmil", "dropout=-0.1", MIL_ERROR_ARGUMENT, "0..1" },
        { "abmil", "dropout", MIL_ERROR_ARGUMENT, "not key=value" },
        { "abmil", "=1", MIL_ERROR_ARGUMENT, "not key=value" },
        { "abmil", "dropout=", MIL_ERROR_ARGUMENT, "a number" },
        { "abmil", "gate=yes", MIL_ERROR_ARGUMENT, "true or false" },
        { "abmil", "gate=2", MIL_ERROR_ARGUMENT, "true or false" },
        { "abmil", "num_classes = 3", MIL_ERROR_ARGUMENT, "no blanks around the =" },
        { "abmil", "num_classes 3", MIL_ERROR_ARGUMENT, "\"num_classes\" is not key=value" },
        { "abmil", "dropout=2", MIL_ERROR_ARGUMENT, "expected a number (0..1)" },
        { "abmil", "in_dim=0", MIL_ERROR_ARGUMENT, "1..1000000" },
        { "abmil", "in_dim=1000001", MIL_ERROR_ARGUMENT, "1..1000000" },
        { "abmil", "in_dim=0x10", MIL_ERROR_ARGUMENT, "whole number" },
        { "abmil", "in_dim=+4", MIL_ERROR_ARGUMENT, "whole number" },
        { "abmil", "in_dim=99999999999999999999", MIL_ERROR_ARGUMENT, "whole number" },
        { "abmil", "in_dmi=4", MIL_ERROR_UNKNOWN, "did you mean \"in_dim\"" },
        { "abmil", "{", MIL_ERROR_FORMAT, "JSON" },
        { "abmil", "{\"in_dim\":4} x", MIL_ERROR_FORMAT, "JSON" },
        { "abmil", "{\"in_dim\":4,\"in\\u005fdim\":5}", MIL_ERROR_FORMAT, "twice" },
        { "abmil", "{\"in_dim\\u0000\":4}", MIL_ERROR_UNKNOWN, "no option" },
        { "abmil", "{\"in_dim\":\"4\\u0000\"}", MIL_ERROR_ARGUMENT, "too long" },
        { "abmil", "{\"in_dim\":[4]}", MIL_ERROR_ARGUMENT, "whole number" },
        { "abmil", "{\"gate\":null}", MIL_ERROR_ARGUMENT, "true or false" },
        { "abmil.torchmil", "att_act=selu", MIL_ERROR_ARGUMENT, "tanh|relu|gelu" },
        { "abmil.torchmil", "feat_ext_sizes=[4,3] feat_ext_activations=['relu', \"relu\"]", MIL_OK, "" },
        { "abmil.torchmil", "feat_ext_sizes=null feat_ext_activations=None", MIL_OK, "" },
        { "abmil.torchmil", "feat_ext_sizes=4", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_sizes=[4", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_sizes=[4]]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_sizes=[4,]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_sizes=[,4]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_sizes=[a]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_sizes=[0]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_sizes=[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_activations=[\"relu]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_activations=['a\"b']", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_activations=[a\\b]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_activations=[\xc3\xa9]", MIL_ERROR_ARGUMENT, "a list" },
        { "abmil.torchmil", "feat_ext_activations=[abcdefghijklmnopqrstuvwxyzabcdef]", MIL_ERROR_ARGUMENT, "a list" },
        { "", NULL, MIL_ERROR_UNKNOWN, "model name" },
        { ".", NULL, MIL_ERROR_UNKNOWN, "model name" },
        { "abmil..uni", NULL, MIL_ERROR_UNKNOWN, "model name" },
        { "abmil.base.uni.none.x", NULL, MIL_ERROR_UNKNOWN, "model name" },
        { "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", NULL, MIL_ERROR_UNKNOWN, "model name" },
        { "ABMIL", NULL, MIL_ERROR_UNKNOWN, "did you mean" },
        { "mymil", NULL, MIL_ERROR_UNKNOWN, "needs mil_register first" },
        { "abmil.base.\xff\xfe", NULL, MIL_ERROR_UNKNOWN, "no encoder" } };
    mil_context *ctx = make_context();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        mil_model *model = mil_create(ctx, cases[i].name, cases[i].options);
        if (!CHECK(mil_error_status(ctx) == cases[i].status && (model != NULL) == (cases[i].status == MIL_OK)))
            printf("  %s %s: %s %s\n", cases[i].name, cases[i].options ? cases[i].options : "", mil_status_name(mil_error_status(ctx)), mil_error(ctx));
        if (!model) CHECK_CONTAINS(mil_error(ctx), cases[i].sentence);
        mil_model_free(model);
    }
    char longest[2000] = "dropout=";                       // a value and a key without end
    memset(longest + 8, '0', 1500);
    CHECK(!mil_create(ctx, "abmil", longest) && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "too long");
    memset(longest, 'k', 1500);
    CHECK(!mil_create(ctx, "abmil", longest) && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    end_context(ctx);
}

// Sixteen texts of the greatest length: what is printed is read again.
TEST(the_longest_configuration_is_saved_and_opened_again)
{
    char options[1200] = "in_dim=2 att_dim=2 feat_ext_sizes=[2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2] feat_ext_activations=[";
    for (int i = 0; i < 16; i++) strcat(options, i ? ",abcdefghijklmnopqrstuvwxyz_relu" : "abcdefghijklmnopqrstuvwxyz_relu");
    strcat(options, "]");
    mil_context *ctx = make_context();
    mil_model *model = mil_create(ctx, "abmil.torchmil", options), *copy = NULL;
    if (CHECK(model != NULL)) {
        char first[2048], second[2048];
        size_t size = 0;
        CHECK(mil_model_config(model, first, sizeof first) < sizeof first);
        CHECK(mil_save_memory(model, NULL, &size) == MIL_OK);
        void *bytes = malloc(size);
        CHECK(mil_save_memory(model, bytes, &size) == MIL_OK);
        copy = mil_open_memory(ctx, bytes, size);
        if (CHECK(copy != NULL)) {
            CHECK(mil_model_config(copy, second, sizeof second) < sizeof second);
            CHECK_STRING(second, first);
        } else printf("  %s\n", mil_error(ctx));
        free(bytes);
    } else printf("  %s\n", mil_error(ctx));
    mil_model_free(copy);
    mil_model_free(model);
    end_context(ctx);
}

TEST(arguments_that_would_overflow_are_refused)
{
    mil_context *ctx = make_context();
    mil_model *model = mil_create(ctx, "abmil", SMALL);
    mil_scorer_options o = mil_scorer_options_default();
    float x[4] = { 0 };
    if (!CHECK(model != NULL)) return;
    o.capacity = INT64_MAX;
    CHECK(!mil_scorer_create(model, &o) && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    CHECK(mil_scorer_bytes(model, &o, 5) == 0 && mil_scorer_bytes(model, NULL, INT64_MAX) == 0);
    o.capacity = -1;
    CHECK(!mil_scorer_create(model, &o) && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    mil_scorer *scorer = mil_scorer_create(model, NULL);
    if (CHECK(scorer != NULL)) {
        CHECK(mil_scorer_push(scorer, x, INT64_MAX, 0, MIL_F32) == MIL_ERROR_ARGUMENT);
        CHECK(mil_scorer_push(scorer, x, -1, 0, MIL_F32) == MIL_ERROR_ARGUMENT);
        CHECK(mil_scorer_push(scorer, NULL, 1, 0, MIL_F32) == MIL_ERROR_ARGUMENT);
        CHECK(mil_scorer_push(scorer, x, 1, 3, MIL_F32) == MIL_ERROR_ARGUMENT);
        CHECK(mil_scorer_push(scorer, x, 1, 0, MIL_DTYPE_COUNT) == MIL_ERROR_ARGUMENT);
        CHECK(mil_scorer_instances(scorer) == 0);
        CHECK(mil_scorer_push(scorer, x, 1, 0, MIL_F32) == MIL_OK && mil_scorer_instances(scorer) == 1);
        mil_bag bag = mil_bag_make(x, INT64_MAX, 4);
        CHECK(mil_scorer_score(scorer, &bag) == MIL_ERROR_ARGUMENT);
        bag = mil_bag_make(x, -1, 4);
        CHECK(mil_scorer_score(scorer, &bag) == MIL_ERROR_ARGUMENT);
        bag = mil_bag_make(NULL, 1, 4);
        CHECK(mil_scorer_score(scorer, &bag) == MIL_ERROR_ARGUMENT);
        bag = mil_bag_make(x, 1, 5);
        CHECK(mil_scorer_score(scorer, &bag) == MIL_ERROR_ARGUMENT);
    }
    mil_scorer_free(scorer);
    mil_model_free(model);
    end_context(ctx);
}

// A description of a tensor takes 40 bytes at least; five bytes each must not be answered with a whole entry each.
TEST(entries_of_five_bytes_take_memory_in_proportion_to_the_file)
{
    enum { COUNT = 20000 };
    mil_context *ctx = make_context();
    for (int way = 0; way < 3; way++) {                    // the same empty name, names of their own, empty objects
        char *bytes = (char *)malloc(8 + COUNT * 16 + 2);
        size_t n = 0;
        bytes[8 + n++] = '{';
        for (int i = 0; i < COUNT; i++) {
            if (i) bytes[8 + n++] = ',';
            if (way == 1) n += (size_t)sprintf(bytes + 8 + n, "\"%d\":0", i);
            else n += (size_t)sprintf(bytes + 8 + n, way ? "\"\":{}" : "\"\":0");
        }
        bytes[8 + n++] = '}';
        for (int i = 0; i < 8; i++) bytes[i] = (char)((uint64_t)n >> (8 * i));
        mil_tensors *file = NULL;
        const size_t before = live;
        peak = live;
        CHECK(mil_tensors_open_memory(ctx, bytes, 8 + n, 0, &file) == MIL_ERROR_FORMAT && !file);
        CHECK(mil_error(ctx)[0] != 0 && live == before);
        if (!CHECK(peak - before < 8 * n)) printf("  way %d: %lu bytes of header, %lu of memory\n", way, (unsigned long)n, (unsigned long)(peak - before));
        free(bytes);
    }
    end_context(ctx);
}

TESTS(T(checkpoints_with_broken_descriptions_are_refused_by_name) T(a_load_that_fails_changes_no_bit_of_the_model)
      T(a_damaged_checkpoint_is_refused_or_scores) T(options_that_break_a_rule_are_named)
      T(the_longest_configuration_is_saved_and_opened_again) T(arguments_that_would_overflow_are_refused)
      T(entries_of_five_bytes_take_memory_in_proportion_to_the_file))
