// build: float double
// Models by name: options, parameters, loading and saving; what is refused is named, and changes nothing.
#include "mil.h"
#include "check.h"
#include "memory.h"
#include <unistd.h>

#define SMALL "in_dim=6 embed_dim=8 attn_dim=4 num_classes=3"

static memory mem;
static mil_context *ctx;

static void begin(void) { ctx = memory_context(&mem, 1, NULL); }

static void end(void)
{
    CHECK(mil_context_bytes(ctx) == 0);
    mil_context_free(ctx);
    CHECK(mem.bytes == 0);
}

// ---- names and options ----
TEST(short_names_are_filled_in)
{
    static const char *const names[][2] = {
        { "abmil", "abmil.base.uni.none" }, { "abmil.base", "abmil.base.uni.none" }, { "abmil.base.conch_v15", "abmil.base.conch_v15.none" },
        { "abmil.base.uni_v2.pc108-24k", "abmil.base.uni_v2.pc108-24k" }, { "abmil.torchmil", "abmil.torchmil.uni.none" }
    };
    static const int64_t dims[] = { 1024, 1024, 768, 1536, 1024 };
    begin();
    for (int i = 0; i < 5; i++) {
        mil_model *m = mil_create(ctx, names[i][0], NULL);
        CHECK_STRING(mil_model_name(m), names[i][1]);
        CHECK(mil_model_in_dim(m) == dims[i]);
        mil_model_free(m);
    }
    end();
}

static void refused(const char *name, const char *options, mil_status status, const char *sentence)
{
    const size_t before = mil_context_bytes(ctx);
    CHECK(mil_create(ctx, name, options) == NULL);
    CHECK(mil_error_status(ctx) == status);
    CHECK_STRING(mil_error(ctx), sentence);
    CHECK(mil_context_bytes(ctx) == before);
}

TEST(unknown_names_are_answered_with_the_nearest)
{
    begin();
    refused("abmli", NULL, MIL_ERROR_UNKNOWN, "no model \"abmli\"; did you mean \"abmil\"? One of your own needs mil_register first");
    refused("abmil.basis", NULL, MIL_ERROR_UNKNOWN, "model abmil has no config \"basis\"; did you mean \"base\"?");
    refused("abmil.base.conch_v2", NULL, MIL_ERROR_UNKNOWN, "no encoder \"conch_v2\"; did you mean \"conch_v1\"?");
    refused("abmil", "embed_dm=4", MIL_ERROR_UNKNOWN, "abmil: no option \"embed_dm\"; did you mean \"embed_dim\"?");
    refused("abmil.tiny", NULL, MIL_ERROR_UNKNOWN, "model abmil has no config \"tiny\"; did you mean \"base\"?");
    refused("abmil..uni.none", NULL, MIL_ERROR_UNKNOWN, "model name \"abmil..uni.none\": expected model.config.encoder.task, at most four parts, none empty");
    refused("abmil.base.uni.none.x", NULL, MIL_ERROR_UNKNOWN, "model name \"abmil.base.uni.none.x\": expected model.config.encoder.task, at most four parts, none empty");
    refused("", NULL, MIL_ERROR_UNKNOWN, "model name \"\": expected model.config.encoder.task, at most four parts, none empty");
    CHECK(mil_create(ctx, NULL, NULL) == NULL && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    CHECK(mil_create(NULL, "abmil", NULL) == NULL);
    end();
}

TEST(options_that_make_no_sense_are_refused)
{
    begin();
    refused("abmil", "gate=maybe", MIL_ERROR_ARGUMENT, "abmil: option gate=\"maybe\": expected true or false");
    refused("abmil", "embed_dim=big", MIL_ERROR_ARGUMENT, "abmil: option embed_dim=\"big\": expected a whole number (1..1000000)");
    refused("abmil", "embed_dim=0", MIL_ERROR_ARGUMENT, "abmil: option embed_dim=\"0\": expected a whole number (1..1000000)");
    refused("abmil", "embed_dim=1.5", MIL_ERROR_ARGUMENT, "abmil: option embed_dim=\"1.5\": expected a whole number (1..1000000)");
    refused("abmil", "dropout=1.5", MIL_ERROR_ARGUMENT, "abmil: option dropout=\"1.5\": expected a number (0..1)");
    refused("abmil", "dropout=nan", MIL_ERROR_ARGUMENT, "abmil: option dropout=\"nan\": expected a number (0..1)");
    refused("abmil", "dropout=", MIL_ERROR_ARGUMENT, "abmil: option dropout=\"\": expected a number (0..1)");
    refused("abmil", "gate", MIL_ERROR_ARGUMENT, "abmil: \"gate\" is not key=value");
    refused("abmil", "num_classes = 3", MIL_ERROR_ARGUMENT, "abmil: \"num_classes\" is not key=value; there may be no blanks around the =");
    refused("abmil", "=3", MIL_ERROR_ARGUMENT, "abmil: \"\" is not key=value");
    refused("abmil.torchmil", "att_act=sin", MIL_ERROR_ARGUMENT, "abmil.torchmil: option att_act=\"sin\": expected tanh|relu|gelu");
    refused("abmil.torchmil", "feat_ext_sizes=[8,x]", MIL_ERROR_ARGUMENT, "abmil.torchmil: option feat_ext_sizes=\"[8,x]\": expected a list of whole numbers, [1,2], or null (1..1000000)");
    CHECK(mil_create(ctx, "abmil", "{\"embed_dim\": }") == NULL && mil_error_status(ctx) == MIL_ERROR_FORMAT);
    CHECK(mil_create(ctx, "abmil", "{\"embed_dim\": [1]}") == NULL && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    CHECK(mil_create(ctx, "abmil", "{\"embed_dm\": 1}") == NULL && mil_error_status(ctx) == MIL_ERROR_UNKNOWN);
    CHECK(mil_create(ctx, "abmil", "embed_dim=1000000 in_dim=1000000") == NULL);               // 10^12 weights
    CHECK(mil_error_status(ctx) == (sizeof(size_t) > 4 ? MIL_ERROR_NO_MEMORY : MIL_ERROR_ARGUMENT));        // with 32 bits: in no memory
    end();
}

TEST(options_come_as_pairs_or_json_and_the_later_wins)
{
    begin();
    mil_model *a = mil_create(ctx, "abmil", " embed_dim=16, attn_dim=8\tgate=false dropout=1e-1 embed_dim=32 ");
    mil_model *b = mil_create(ctx, "abmil", "{\"attn_dim\": 8, \"gate\": false, \"dropout\": 0.1, \"embed_dim\": 32}");
    CHECK_STRING(mil_model_option(a, "embed_dim"), "32");
    CHECK_STRING(mil_model_option(a, "gate"), "false");
    CHECK_STRING(mil_model_option(a, "dropout"), "0.1");
    CHECK_STRING(mil_model_option(a, "in_dim"), "1024");
    CHECK(mil_model_option(a, "depth") == NULL && mil_model_option(NULL, "gate") == NULL);
    char text[2][512];
    const size_t length = mil_model_config(a, text[0], sizeof text[0]);
    CHECK(length == strlen(text[0]) && mil_model_config(a, NULL, 0) == length);
    CHECK(mil_model_config(a, text[1], 10) == length && strlen(text[1]) == 9);                 // cut, with its 0
    mil_model_config(b, text[1], sizeof text[1]);
    CHECK_STRING(text[0], text[1]);
    CHECK_STRING(text[0], "{\"in_dim\":1024,\"num_classes\":2,\"embed_dim\":32,\"attn_dim\":8,\"num_fc_layers\":1,\"gate\":false,\"dropout\":0.1}");
    mil_model *c = mil_create(ctx, "abmil", text[0]);      // a config is read back as options
    mil_model_config(c, text[1], sizeof text[1]);
    CHECK_STRING(text[0], text[1]);
    mil_model *lists = mil_create(ctx, "abmil.torchmil", "in_dim=6 feat_ext_sizes=[8, 4] feat_ext_activations=['relu','none']");
    mil_model_config(lists, text[0], sizeof text[0]);
    CHECK_CONTAINS(text[0], "\"feat_ext_sizes\":[8,4],\"feat_ext_activations\":[\"relu\",\"none\"]");
    mil_model *again = mil_create(ctx, "abmil.torchmil", text[0]);
    mil_model_config(again, text[1], sizeof text[1]);
    CHECK_STRING(text[0], text[1]);
    mil_model_free(a);
    mil_model_free(b);
    mil_model_free(c);
    mil_model_free(lists);
    mil_model_free(again);
    end();
}

// As a program that indents its JSON writes it, one item a line; the items with blanks of every kind around them.
TEST(a_list_may_stand_on_several_lines)
{
    static const char *const options[] = {
        "{\n  \"in_dim\": 6,\n  \"feat_ext_sizes\": [\n    8,\n    4\n  ],\n  \"feat_ext_activations\": [\n    \"relu\",\n    \"none\"\n  ]\n}\n",
        "{\r\n\t\"in_dim\": 6,\r\n\t\"feat_ext_sizes\": [\r\n\t\t8,\r\n\t\t4\r\n\t],\r\n\t\"feat_ext_activations\": [\r\n\t\t\"relu\",\r\n\t\t\"none\"\r\n\t]\r\n}",
        "{\"in_dim\":6,\"feat_ext_sizes\":[ \t\r\n8\t,\n4 \n],\"feat_ext_activations\":[\n\"relu\" , \t\"none\"\r]}",
        "{\"in_dim\":6,\"feat_ext_sizes\":[8,4],\"feat_ext_activations\":[\"relu\",\"none\"]}"
    };
    char text[512];
    begin();
    for (int k = 0; k < 4; k++) {
        mil_model *m = mil_create(ctx, "abmil.torchmil", options[k]);
        if (!CHECK(m != NULL)) { puts(mil_error(ctx)); continue; }
        mil_model_config(m, text, sizeof text);
        CHECK_CONTAINS(text, "\"feat_ext_sizes\":[8,4],\"feat_ext_activations\":[\"relu\",\"none\"]");
        mil_model_free(m);
    }
    mil_model *none = mil_create(ctx, "abmil.torchmil", "{\n\t\"in_dim\": 6,\n\t\"feat_ext_sizes\": [\n\t]\n}");
    CHECK(none != NULL);
    mil_model_free(none);
    CHECK(mil_create(ctx, "abmil.torchmil", "{\"in_dim\":6,\"feat_ext_sizes\":[\n8\n4\n]}") == NULL && mil_error_status(ctx) == MIL_ERROR_FORMAT);
    end();
}

TEST(encoders_give_the_widths_of_the_reference)
{
    static const struct { const char *name; int64_t dim; } table[] = {
        { "conch_v1", 512 }, { "ctranspath", 768 }, { "conch_v15", 768 }, { "phikon", 768 }, { "uni", 1024 }, { "resnet50", 1024 },
        { "phikon_v2", 1024 }, { "musk", 1024 }, { "uni_v2", 1536 }, { "gigapath", 1536 }, { "hoptimus", 1536 }, { "hoptimus1", 1536 },
        { "virchow", 2560 }, { "virchow2", 2560 }
    };
    for (int i = 0; i < 14; i++) CHECK(mil_encoder_dim(table[i].name) == table[i].dim);
    CHECK(mil_encoder_dim("uni_v3") == 0 && mil_encoder_dim(NULL) == 0 && mil_encoder_dim("") == 0);
}

// ---- parameters ----
TEST(parameter_counts_are_those_of_the_reference)
{
    static const struct { const char *name, *options; int64_t count; } table[] = {
        { "abmil", NULL, 920195 },
        { "abmil", "gate=false", 920195 - 384 * 513 },
        { "abmil", "num_classes=5", 920195 + 3 * 513 },
        { "abmil", "num_classes=0", 920195 - 2 * 513 },
        { "abmil", "num_fc_layers=3", 920195 + 2 * 512 * 513 },
        { "abmil.torchmil", "in_dim=7 att_dim=5", 7 * 5 + 5 + 5 + 7 + 1 },
        { "abmil.torchmil", "in_dim=7 att_dim=5 gated=true", 2 * (7 * 5 + 5) + 5 + 7 + 1 }
    };
    begin();
    for (int i = 0; i < 7; i++) {
        mil_model *m = mil_create(ctx, table[i].name, table[i].options);
        CHECK_NEAR(mil_model_parameter_count(m), table[i].count, 0);
        int64_t sum = 0;
        for (int64_t k = 0; k < mil_model_param_count(m); k++) sum += mil_model_param(m, k)->count;
        CHECK(sum == mil_model_parameter_count(m));
        mil_model_free(m);
    }
    end();
}

TEST(keys_are_found_with_and_without_prefixes)
{
    begin();
    mil_model *m = mil_create(ctx, "abmil", SMALL);
    mil_param *p = mil_model_find(m, "global_attn.attention_a.0.weight");
    CHECK(p && p->rank == 2 && p->shape[0] == 4 && p->shape[1] == 8 && p->trainable);
    CHECK(mil_model_find(m, "model.global_attn.attention_a.0.weight") == p);
    CHECK(mil_model_find(m, "module.global_attn.attention_a.0.weight") == p);
    CHECK(mil_model_find(m, "module.model.global_attn.attention_a.0.weight") == p);
    CHECK(mil_model_find(m, "model..global_attn.attention_a.0.weight") == p);
    CHECK(!mil_model_find(m, "global_attn.attention_a.0") && !mil_model_find(m, "") && !mil_model_find(m, "model.") && !mil_model_find(m, NULL));
    CHECK(mil_model_param(m, -1) == NULL && mil_model_param(m, mil_model_param_count(m)) == NULL);
    mil_real value[32];
    CHECK(mil_param_read(p, value, 31) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "has 32 elements");
    for (int i = 0; i < 32; i++) value[i] = (mil_real)i;
    const int64_t version = p->version;
    CHECK(mil_param_write(p, value, 32) == MIL_OK && p->version > version);
    memset(value, 0, sizeof value);
    CHECK(mil_param_read(p, value, 32) == MIL_OK && value[31] == 31);
    mil_model_free(m);
    end();
}

TEST(what_cannot_be_read_or_written_is_said)
{
    begin();
    mil_model *m = mil_create(ctx, "clam", "in_dim=6 embed_dim=8 attention_dim=4");
    mil_param *p = mil_model_find(m, "classifier.bias"), *labels = mil_model_find(m, "instance_loss_fn.labels");
    mil_real value[3] = { 5, 6, 7 }, now[2] = { 1, 1 };
    if (!CHECK(p && labels && p->count == 2 && labels->count == 2 && labels->dtype == MIL_I64)) return;
    const int64_t version = p->version;
    CHECK(mil_param_read(p, NULL, 2) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "mil_param_read: classifier.bias: the caller's memory is NULL");
    CHECK(mil_param_write(p, NULL, 2) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "mil_param_write: classifier.bias: the caller's memory is NULL");
    CHECK(mil_param_read(p, value, 3) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "mil_param_read: classifier.bias has 2 elements, not 3");
    CHECK(mil_param_write(p, value, 1) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "mil_param_write: classifier.bias has 2 elements, not 1");
    CHECK(mil_param_read(labels, value, 2) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "mil_param_read: instance_loss_fn.labels holds I64, no mil_real");
    CHECK(mil_param_write(labels, value, 2) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "mil_param_write: instance_loss_fn.labels holds I64, no mil_real");
    CHECK(mil_param_read(NULL, value, 2) == MIL_ERROR_ARGUMENT && mil_param_write(NULL, value, 2) == MIL_ERROR_ARGUMENT);
    CHECK(value[0] == 5 && value[1] == 6 && value[2] == 7 && p->version == version);
    CHECK(((const int64_t *)labels->data)[0] == 0 && ((const int64_t *)labels->data)[1] == 1);
    CHECK(mil_param_read(p, now, 2) == MIL_OK && now[0] == 0 && now[1] == 0);
    mil_model_free(m);
    end();
}

TEST(fresh_weights_keep_their_bounds_and_are_the_same_everywhere)
{
    static const char *const names[] = { "abmil", "abmil.torchmil" };
    begin();
    for (int k = 0; k < 2; k++) {
        mil_model *a = mil_create(ctx, names[k], "in_dim=96"), *b = mil_create(ctx, names[k], "in_dim=96");
        CHECK(mil_model_init(b, 1) == MIL_OK);
        int differs = 0;
        for (int64_t i = 0; i < mil_model_param_count(a); i++) {
            const mil_param *p = mil_model_param(a, i), *weight = i % 2 && p->rank == 1 ? mil_model_param(a, i - 1) : p;
            const mil_real *x = (const mil_real *)p->data;
            differs |= memcmp(x, mil_model_param(b, i)->data, (size_t)p->count * sizeof *x) != 0;
            const double in = (double)weight->shape[weight->rank - 1], bound = k == 0 ? (p->rank == 2 ? sqrt(6 / in) : 0) : 1 / sqrt(in);
            double top = 0, sum = 0, squares = 0;
            for (int64_t e = 0; e < p->count; e++) {
                top = fabs((double)x[e]) > top ? fabs((double)x[e]) : top;
                sum += (double)x[e];
                squares += (double)x[e] * (double)x[e];
            }
            if (!CHECK(top <= bound * (1 + 1e-6))) puts(p->key);
            if (p->count < 1000 || bound == 0) continue;
            CHECK(top > 0.98 * bound);                                         // a thousand draws come near the ends,
            CHECK(fabs(sum / (double)p->count) < 4 * bound / sqrt(3.0 * (double)p->count));                     // are centred (4 deviations)
            CHECK(fabs(squares / (double)p->count * 3 / (bound * bound) - 1) < 4 * 0.9 / sqrt((double)p->count));      // and as wide as uniform ones
        }
        CHECK(differs);
        CHECK(mil_model_init(b, 0) == MIL_OK);
        for (int64_t i = 0; i < mil_model_param_count(a); i++)
            CHECK(memcmp(mil_model_param(a, i)->data, mil_model_param(b, i)->data, (size_t)mil_model_param(a, i)->count * sizeof(mil_real)) == 0);
        mil_model_free(a);
        mil_model_free(b);
    }
    end();
}

// ---- files in memory ----
enum { KEYS = 24 };
typedef struct state { mil_tensor tensor[KEYS]; char text[KEYS][96]; const char *name[KEYS]; int64_t count; } state;

static state state_of(const mil_model *m, const char *prefix)
{
    state s;
    memset(&s, 0, sizeof s);
    s.count = mil_model_param_count(m);
    for (int64_t i = 0; i < s.count; i++) {
        const mil_param *p = mil_model_param(m, i);
        s.tensor[i] = mil_tensor_make(p->data, p->dtype, p->rank, p->shape);
        snprintf(s.text[i], sizeof s.text[i], "%s%s", prefix, p->key);
    }
    return s;
}

static char file[1 << 16];
static size_t file_size;

static void write_state(state *s, const mil_meta *meta, int64_t meta_count)
{
    for (int64_t i = 0; i < s->count; i++) s->name[i] = s->text[i];
    file_size = sizeof file;
    if (!CHECK(mil_tensors_write_memory(ctx, s->tensor, s->name, s->count, meta, meta_count, file, &file_size) == MIL_OK)) puts(mil_error(ctx));
}

static int64_t find_state(const state *s, const char *key)
{
    for (int64_t i = 0; i < s->count; i++) if (strstr(s->text[i], key)) return i;
    return CHECK(!"key in the state"), 0;
}

static void drop_state(state *s, const char *key)
{
    const int64_t i = find_state(s, key), last = --s->count;
    s->tensor[i] = s->tensor[last];
    memcpy(s->text[i], s->text[last], sizeof s->text[i]);
}

// All parameters' bits, to see whether anything changed.
static uint64_t bits_of(const mil_model *m)
{
    uint64_t h = 1;
    for (int64_t i = 0; i < mil_model_param_count(m); i++) {
        const mil_param *p = mil_model_param(m, i);
        const unsigned char *at = (const unsigned char *)p->data;
        for (size_t k = 0; k < (size_t)p->count * mil_dtype_size(p->dtype); k++) h = (h ^ at[k]) * 1099511628211u;
    }
    return h;
}

TEST(saved_and_loaded_models_have_the_same_bytes)
{
    static const char *const models[][2] = {
        { "abmil", SMALL }, { "abmil", "in_dim=6 embed_dim=8 attn_dim=4 num_fc_layers=2 gate=false" },
        { "abmil.torchmil", "in_dim=6 att_dim=4 gated=true feat_ext_sizes=[5,3] feat_ext_activations=[relu,none]" }
    };
    static const char *const classes[] = { "benign \"tissue\"", "tumour, \\ high grade", "\xc3\xa9tranger" };
    static char first[1 << 16], second[1 << 16];
    begin();
    for (int k = 0; k < 3; k++) {
        mil_model *a = mil_create(ctx, models[k][0], models[k][1]);
        size_t need = 0, size, again;
        CHECK(mil_model_init(a, 5) == MIL_OK);
        CHECK(mil_model_set_metadata(a, "mil.note", "trained on Tuesdays") == MIL_OK);
        CHECK(mil_model_set_metadata(a, "site", "A\nB") == MIL_OK && mil_model_set_metadata(a, "gone", "x") == MIL_OK && mil_model_set_metadata(a, "gone", NULL) == MIL_OK);
        if (k == 0) CHECK(mil_model_set_class_names(a, classes, 3) == MIL_OK);
        CHECK(mil_save_memory(a, NULL, &need) == MIL_OK);
        size = need - 1;
        CHECK(mil_save_memory(a, first, &size) == MIL_ERROR_ARGUMENT && size == need);
        size = sizeof first;
        CHECK(mil_save_memory(a, first, &size) == MIL_OK && size == need);
        mil_model *b = mil_open_memory(ctx, first, size);
        if (!CHECK(b != NULL)) { puts(mil_error(ctx)); return; }
        CHECK(bits_of(a) == bits_of(b));
        CHECK_STRING(mil_model_name(b), mil_model_name(a));
        CHECK_STRING(mil_model_metadata(b, "mil.note"), "trained on Tuesdays");
        CHECK_STRING(mil_model_metadata(b, "site"), "A\nB");
        CHECK(mil_model_metadata(b, "gone") == NULL && mil_model_metadata(b, "mil.model") == NULL);
        for (int c = 0; c < 3; c++) {
            if (k == 0) CHECK_STRING(mil_model_class_name(b, c), classes[c]);
            else CHECK(mil_model_class_name(b, c) == NULL);
        }
        again = sizeof second;
        CHECK(mil_save_memory(b, second, &again) == MIL_OK);
        CHECK(again == size && memcmp(first, second, size) == 0);
        CHECK(mil_model_init(b, 9) == MIL_OK && bits_of(a) != bits_of(b));
        CHECK(mil_load_memory(b, first, size, NULL) == MIL_OK && bits_of(a) == bits_of(b));
        mil_model_free(a);
        mil_model_free(b);
    }
    end();
}

TEST(prefixes_of_wrappers_are_understood)
{
    static const char *const prefixes[] = { "", "model.", "module.", "module.model.", "model.." };
    begin();
    mil_model *a = mil_create(ctx, "abmil", SMALL), *b = mil_create(ctx, "abmil", SMALL);
    CHECK(mil_model_init(a, 3) == MIL_OK);
    for (int k = 0; k < 5; k++) {
        state s = state_of(a, prefixes[k]);
        write_state(&s, NULL, 0);
        CHECK(mil_model_init(b, 4) == MIL_OK && bits_of(a) != bits_of(b));
        CHECK(mil_load_memory(b, file, file_size, NULL) == MIL_OK);
        CHECK(bits_of(a) == bits_of(b));
    }
    state s = state_of(a, "");
    snprintf(s.text[s.count], sizeof s.text[0], "model.%.80s", s.text[0]);      // one parameter under two names
    s.tensor[s.count++] = s.tensor[0];
    write_state(&s, NULL, 0);
    CHECK(mil_load_memory(b, file, file_size, NULL) == MIL_ERROR_FORMAT);
    CHECK_CONTAINS(mil_error(ctx), "are both patch_embed.0.");
    mil_model_free(a);
    mil_model_free(b);
    end();
}

// A file of other dtypes: converted, exact where the number exists.
TEST(weights_of_other_types_are_converted)
{
    begin();
    mil_model *m = mil_create(ctx, "abmil", SMALL);
    double wide[48];
    uint16_t brain[8];
    for (int i = 0; i < 48; i++) wide[i] = i / 8.0 - 3;
    for (int i = 0; i < 8; i++) brain[i] = (uint16_t)(0x3f80 + 0x80 * i);      // 1, 2, 4, ...
    state s = state_of(m, "");
    const int64_t w = find_state(&s, "patch_embed.0.weight"), b = find_state(&s, "patch_embed.0.bias");
    s.tensor[w] = mil_tensor_matrix(wide, MIL_F64, 8, 6);
    s.tensor[b].dtype = MIL_BF16;
    s.tensor[b].data = brain;
    write_state(&s, NULL, 0);
    CHECK(mil_load_memory(m, file, file_size, NULL) == MIL_OK);
    const mil_real *x = (const mil_real *)mil_model_find(m, "patch_embed.0.weight")->data, *y = (const mil_real *)mil_model_find(m, "patch_embed.0.bias")->data;
    for (int i = 0; i < 48; i++) CHECK((double)x[i] == wide[i]);
    for (int i = 0; i < 8; i++) CHECK(y[i] == (mil_real)(1 << i));
    mil_model_free(m);
    end();
}

TEST(files_that_do_not_fit_are_named_and_change_nothing)
{
    static const mil_real three[] = { 1, 2, 3 };
    begin();
    mil_model *m = mil_create(ctx, "abmil", SMALL), *other = mil_create(ctx, "abmil", SMALL);
    CHECK(mil_model_init(other, 8) == MIL_OK);
    const uint64_t before = bits_of(m);
    mil_load_options lax = mil_load_options_default();
    lax.allow_missing = lax.allow_extra = 1;

    state s = state_of(other, "model.");
    drop_state(&s, "attention_c.bias");
    drop_state(&s, "patch_embed.0.weight");
    snprintf(s.text[s.count], sizeof s.text[0], "model.head.scale");
    s.tensor[s.count++] = mil_tensor_matrix(three, MIL_REAL_DTYPE, 1, 3);
    write_state(&s, NULL, 0);
    CHECK(mil_load_memory(m, file, file_size, NULL) == MIL_ERROR_UNKNOWN);
    CHECK_STRING(mil_error(ctx), "safetensors in memory does not fit abmil.base.uni.none: missing patch_embed.0.weight, global_attn.attention_c.bias; not in the model model.head.scale");
    CHECK(bits_of(m) == before);
    CHECK(mil_load_memory(m, file, file_size, &lax) == MIL_OK);                // the rest is loaded
    CHECK(memcmp(mil_model_find(m, "classifier.weight")->data, mil_model_find(other, "classifier.weight")->data, 24 * sizeof(mil_real)) == 0);
    CHECK(memcmp(mil_model_find(m, "patch_embed.0.weight")->data, mil_model_find(other, "patch_embed.0.weight")->data, 48 * sizeof(mil_real)) != 0);
    CHECK(mil_model_init(m, 0) == MIL_OK && bits_of(m) == before);

    s = state_of(other, "model.");
    s.tensor[find_state(&s, "classifier.bias")].shape[0] = 2;
    write_state(&s, NULL, 0);
    CHECK(mil_load_memory(m, file, file_size, &lax) == MIL_ERROR_SHAPE);
    CHECK_STRING(mil_error(ctx), "safetensors in memory: model.classifier.bias is [2], the model abmil.base.uni.none has [3]");
    CHECK(bits_of(m) == before);

    mil_real *w = (mil_real *)mil_model_find(other, "global_attn.attention_b.0.weight")->data;
    for (int k = 0; k < 2; k++) {
        w[31] = (mil_real)(k ? (double)INFINITY : (double)NAN);
        s = state_of(other, "model.");
        write_state(&s, NULL, 0);
        CHECK(mil_load_memory(m, file, file_size, NULL) == MIL_ERROR_NUMERIC);
        CHECK_STRING(mil_error(ctx), "safetensors in memory: model.global_attn.attention_b.0.weight holds NaN or infinity");
        CHECK(bits_of(m) == before);
    }
    lax.check_finite = 0;
    CHECK(mil_load_memory(m, file, file_size, &lax) == MIL_OK && bits_of(m) == bits_of(other));

    CHECK(mil_load_memory(m, file, file_size / 2, NULL) == MIL_ERROR_FORMAT);
    CHECK(mil_load_memory(m, NULL, 0, NULL) != MIL_OK && mil_error(ctx)[0]);
    CHECK(mil_load_memory(NULL, file, file_size, NULL) == MIL_ERROR_ARGUMENT);
    mil_model_free(m);
    mil_model_free(other);
    end();
}

TEST(many_missing_names_are_counted)
{
    static const mil_real one = 1;
    begin();
    mil_model *m = mil_create(ctx, "abmil", SMALL);
    state s;
    memset(&s, 0, sizeof s);
    snprintf(s.text[0], sizeof s.text[0], "x");
    s.tensor[0] = mil_tensor_matrix(&one, MIL_REAL_DTYPE, 1, 1);
    s.count = 1;
    write_state(&s, NULL, 0);
    CHECK(mil_load_memory(m, file, file_size, NULL) == MIL_ERROR_UNKNOWN);
    CHECK_CONTAINS(mil_error(ctx), "missing patch_embed.0.weight, patch_embed.0.bias, ");
    CHECK_CONTAINS(mil_error(ctx), ", ...; not in the model x");
    mil_model_free(m);
    end();
}

// ---- files on disk ----
static char folder[256];

static const char *path_of(const char *name)
{
    static char path[2][512];
    static int turn;
    if (!folder[0]) {
        const char *base = getenv("TMPDIR");
        snprintf(folder, sizeof folder, "%.200s/mil_test_model_XXXXXX", base ? base : "/tmp");
        if (!mkdtemp(folder)) puts("no temporary folder");
    }
    turn ^= 1;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static void end_with_files(const char *a, const char *b)   // end(), and the folder with these two files goes
{
    unlink(path_of(a));
    unlink(path_of(b));
    rmdir(folder);
    folder[0] = 0;
    end();
}

TEST(files_without_a_classifier_open_with_a_fresh_one)         // as FEATHER's are published
{
    static const char *const configs[] = {
        "{\"model_type\": \"abmil\", \"architectures\": [\"ABMILModel\"], \"gate\": true, \"embed_dim\": 8, \"attn_dim\": 4, \"num_fc_layers\": 1,"
            " \"dropout\": 0.25, \"in_dim\": 6, \"num_classes\": 2, \"torch_dtype\": \"float32\", \"transformers_version\": \"4.51.0\"}",
        "{\"gate\": true, \"embed_dim\": 8, \"attn_dim\": 4, \"num_fc_layers\": 1, \"dropout\": 0.25, \"in_dim\": 6, \"num_classes\": 2}"
    };
    begin();
    mil_model *a = mil_create(ctx, "abmil", "in_dim=6 embed_dim=8 attn_dim=4"), *b = mil_create(ctx, "abmil", "in_dim=6 embed_dim=8 attn_dim=4 num_classes=5");
    CHECK(mil_model_init(a, 3) == MIL_OK);
    state s = state_of(a, "model.");
    drop_state(&s, "classifier.weight");
    drop_state(&s, "classifier.bias");
    write_state(&s, NULL, 0);
    CHECK(mil_file_write(ctx, path_of("model.safetensors"), file, file_size) == MIL_OK);

    CHECK(mil_load(b, path_of("model.safetensors")) == MIL_ERROR_UNKNOWN);
    CHECK_CONTAINS(mil_error(ctx), "missing classifier.weight, classifier.bias; mil_load_options.new_head leaves");
    mil_load_options o = mil_load_options_default();
    o.new_head = 1;
    CHECK(mil_load_with(b, path_of("model.safetensors"), &o) == MIL_OK);       // another number of classes is fine then
    CHECK(memcmp(mil_model_find(a, "patch_embed.0.weight")->data, mil_model_find(b, "patch_embed.0.weight")->data, 48 * sizeof(mil_real)) == 0);

    CHECK(mil_open(ctx, path_of("model.safetensors")) == NULL);
    CHECK_CONTAINS(mil_error(ctx), "no config.json beside it");
    for (int k = 0; k < 2; k++) {
        CHECK(mil_file_write(ctx, path_of("config.json"), configs[k], strlen(configs[k])) == MIL_OK);
        mil_model *c = mil_open(ctx, path_of("model.safetensors"));
        if (!CHECK(c != NULL)) { puts(mil_error(ctx)); continue; }
        CHECK_STRING(mil_model_name(c), "abmil.base.uni.none");
        CHECK(memcmp(mil_model_find(a, "patch_embed.0.weight")->data, mil_model_find(c, "patch_embed.0.weight")->data, 48 * sizeof(mil_real)) == 0);
        CHECK_STRING(mil_model_metadata(c, "mil.head"), "fresh");
        mil_model_free(c);
    }
    static const char *const wrong[] = { "{\"gate\": 1, \"width\": 8}", "{\"model_type\": \"resnet\"}", "{", "[1]", "{\"model_type\": 4}",
                                         "{\"in_dim\": 6, \"\": 1}", "{\"in_dim\": 6, \"torch_dtype dtype\": 1}" };
    for (int k = 0; k < (int)(sizeof wrong / sizeof *wrong); k++) {
        CHECK(mil_file_write(ctx, path_of("config.json"), wrong[k], strlen(wrong[k])) == MIL_OK);
        if (!CHECK(mil_open(ctx, path_of("model.safetensors")) == NULL && mil_error(ctx)[0])) puts(wrong[k]);
    }
    {                                                      // nor one of more than a megabyte, which none is
        const size_t size = ((size_t)1 << 20) + 1;
        char *blanks = (char *)malloc(size);
        if (CHECK(blanks != NULL)) {
            memset(blanks, ' ', size);
            memcpy(blanks, configs[0], strlen(configs[0]));
            CHECK(mil_file_write(ctx, path_of("config.json"), blanks, size) == MIL_OK);
            CHECK(mil_open(ctx, path_of("model.safetensors")) == NULL);
            CHECK(mil_file_write(ctx, path_of("config.json"), blanks, size - 1) == MIL_OK);
            mil_model *c = mil_open(ctx, path_of("model.safetensors"));
            CHECK(c != NULL);
            mil_model_free(c);
        }
        free(blanks);
    }
    unlink(path_of("config.json"));

    CHECK(mil_save(a, path_of("whole.safetensors")) == MIL_OK);
    mil_model *d = mil_open(ctx, path_of("whole.safetensors"));
    CHECK(d && bits_of(d) == bits_of(a));
    CHECK(mil_load(b, path_of("whole.safetensors")) == MIL_ERROR_SHAPE);       // two classes of a, five of b
    CHECK_CONTAINS(mil_error(ctx), "whole.safetensors: model.classifier.");
    CHECK(mil_open(ctx, path_of("absent.safetensors")) == NULL && mil_error_status(ctx) == MIL_ERROR_IO);
    CHECK(mil_load(a, path_of("absent.safetensors")) == MIL_ERROR_IO);
    CHECK(mil_save(a, path_of("no/such/folder")) == MIL_ERROR_IO);
    mil_model_free(a);
    mil_model_free(b);
    mil_model_free(d);
    end_with_files("model.safetensors", "whole.safetensors");
}

// Without a model_type the file's tensors say which model it is: all of one, or all but its whole head.
TEST(a_file_that_lacks_a_tensor_is_no_models)
{
    static const char text[] = "{\"in_dim\": 6, \"embed_dim\": 8, \"attn_dim\": 4}";
    static const char *const names[3] = { "model.patch_embed.0.bias", "model.classifier.bias", NULL };
    begin();
    mil_model *a = mil_create(ctx, "abmil", "in_dim=6 embed_dim=8 attn_dim=4");
    CHECK(mil_file_write(ctx, path_of("config.json"), text, strlen(text)) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        state s = state_of(a, "model.");
        if (names[k]) {                                    // the last takes its place
            const int64_t gone = find_state(&s, names[k]);
            s.count--;
            s.tensor[gone] = s.tensor[s.count];
            memcpy(s.text[gone], s.text[s.count], sizeof s.text[gone]);
        }
        write_state(&s, NULL, 0);
        CHECK(mil_file_write(ctx, path_of("model.safetensors"), file, file_size) == MIL_OK);
        mil_model *b = mil_open(ctx, path_of("model.safetensors"));
        CHECK((b != NULL) == (names[k] == NULL));
        if (names[k]) CHECK_CONTAINS(mil_error(ctx), "has no model_type, and no model has just its options and the file's tensors");
        mil_model_free(b);
    }
    mil_model_free(a);
    end_with_files("config.json", "model.safetensors");
}

// One of the two names is the end of the other, and what is skipped must be found whichever comes first.
TEST(a_config_with_dtype_and_torch_dtype_opens)
{
    static const char *const both[] = {
        "\"torch_dtype\": \"float32\"", "\"dtype\": \"float32\"", "\"torch_dtype\": \"float32\", \"dtype\": \"float32\"",
        "\"dtype\": \"float32\", \"torch_dtype\": \"float32\""
    };
    static const char *const parts[] = { "type", "torch", "torch_dtyp", "dtype_" };       // are none of them
    char text[256];
    begin();
    mil_model *a = mil_create(ctx, "abmil", "in_dim=6 embed_dim=8 attn_dim=4");
    CHECK(mil_model_init(a, 3) == MIL_OK);
    state s = state_of(a, "model.");
    write_state(&s, NULL, 0);
    CHECK(mil_file_write(ctx, path_of("model.safetensors"), file, file_size) == MIL_OK);
    for (int k = 0; k < 4; k++) {
        snprintf(text, sizeof text, "{\"model_type\": \"abmil\", \"in_dim\": 6, \"embed_dim\": 8, \"attn_dim\": 4, %s}", both[k]);
        CHECK(mil_file_write(ctx, path_of("config.json"), text, strlen(text)) == MIL_OK);
        mil_model *b = mil_open(ctx, path_of("model.safetensors"));
        if (!CHECK(b && bits_of(b) == bits_of(a))) printf("%s: %s\n", both[k], mil_error(ctx));
        mil_model_free(b);
        snprintf(text, sizeof text, "{\"model_type\": \"abmil\", \"in_dim\": 6, \"embed_dim\": 8, \"attn_dim\": 4, \"%s\": 1}", parts[k]);
        CHECK(mil_file_write(ctx, path_of("config.json"), text, strlen(text)) == MIL_OK);
        CHECK(mil_open(ctx, path_of("model.safetensors")) == NULL && mil_error_status(ctx) == MIL_ERROR_UNKNOWN);
    }
    mil_model_free(a);
    end_with_files("config.json", "model.safetensors");
}

// Another number of classes: the classifier is fresh, and so are the instance classifiers that only one side has.
TEST(a_new_head_takes_what_both_have)
{
    begin();
    mil_load_options o = mil_load_options_default();
    o.new_head = 1;
    for (int more = 0; more < 2; more++) {
        mil_model *a = mil_create(ctx, "clam", more ? "in_dim=6 embed_dim=8 num_classes=2" : "in_dim=6 embed_dim=8 num_classes=4");
        mil_model *b = mil_create(ctx, "clam", more ? "in_dim=6 embed_dim=8 num_classes=4" : "in_dim=6 embed_dim=8 num_classes=2");
        CHECK(mil_model_init(a, 3) == MIL_OK && mil_model_init(b, 4) == MIL_OK);
        state s = state_of(a, "module.model.");
        write_state(&s, NULL, 0);
        CHECK(mil_load_memory(b, file, file_size, NULL) == MIL_ERROR_SHAPE);
        if (!CHECK(mil_load_memory(b, file, file_size, &o) == MIL_OK)) puts(mil_error(ctx));
        CHECK(memcmp(mil_model_find(a, "patch_embed.0.weight")->data, mil_model_find(b, "patch_embed.0.weight")->data, 48 * sizeof(mil_real)) == 0);
        CHECK(memcmp(mil_model_find(a, "instance_classifiers.1.weight")->data, mil_model_find(b, "instance_classifiers.1.weight")->data, 16 * sizeof(mil_real)) == 0);
        CHECK(memcmp(mil_model_find(a, "classifier.weight")->data, mil_model_find(b, "classifier.weight")->data, 16 * sizeof(mil_real)) != 0);
        drop_state(&s, "patch_embed.0.bias");
        write_state(&s, NULL, 0);
        CHECK(mil_load_memory(b, file, file_size, &o) == MIL_ERROR_UNKNOWN);
        CHECK_CONTAINS(mil_error(ctx), "missing patch_embed.0.bias");
        mil_model_free(a);
        mil_model_free(b);
    }
    mil_model *a = mil_create(ctx, "abmil", SMALL), *b = mil_create(ctx, "abmil", SMALL " num_classes=0");       // features only
    state s = state_of(a, "model.");
    write_state(&s, NULL, 0);
    CHECK(mil_load_memory(b, file, file_size, NULL) == MIL_ERROR_UNKNOWN);
    CHECK_CONTAINS(mil_error(ctx), "not in the model model.classifier.");
    CHECK(mil_load_memory(b, file, file_size, &o) == MIL_OK);
    mil_model_free(a);
    mil_model_free(b);
    end();
}

TEST(class_names_and_metadata_are_checked)
{
    static const char *const names[] = { "a", "b", NULL };
    begin();
    mil_model *m = mil_create(ctx, "abmil", SMALL);
    CHECK(mil_model_set_class_names(m, names, 2) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "2 names for 3 classes");
    CHECK(mil_model_set_class_names(m, names, 3) == MIL_ERROR_ARGUMENT && mil_model_class_name(m, 0) == NULL);
    CHECK(mil_model_set_class_names(m, NULL, 3) == MIL_ERROR_ARGUMENT);
    CHECK(mil_model_set_metadata(m, NULL, "x") == MIL_ERROR_ARGUMENT && mil_model_set_metadata(m, "", "x") == MIL_ERROR_ARGUMENT);
    CHECK(mil_model_set_metadata(m, "k", "1") == MIL_OK && mil_model_set_metadata(m, "k", "2") == MIL_OK);
    CHECK_STRING(mil_model_metadata(m, "k"), "2");
    mil_model_free(m);
    end();
}

// What could not be saved is not taken, so that a later save does not fail for it.
TEST(metadata_that_is_no_utf8_is_refused_and_the_model_saves)
{
    static const char *const wrong[] = { "caf\xe9", "\xff", "\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf5\x80\x80\x80" };
    begin();
    mil_model *m = mil_create(ctx, "abmil", SMALL);
    CHECK(mil_model_set_metadata(m, "note", "caf\xc3\xa9") == MIL_OK);
    for (int k = 0; k < 6; k++) {
        CHECK(mil_model_set_metadata(m, "note", wrong[k]) == MIL_ERROR_ARGUMENT);
        CHECK_CONTAINS(mil_error(ctx), "is not UTF-8");
        CHECK(mil_model_set_metadata(m, wrong[k], "x") == MIL_ERROR_ARGUMENT);
        CHECK_CONTAINS(mil_error(ctx), "is not UTF-8");
        CHECK(mil_model_metadata(m, wrong[k]) == NULL);
        CHECK_STRING(mil_model_metadata(m, "note"), "caf\xc3\xa9");
    }
    file_size = sizeof file;
    CHECK(mil_save_memory(m, file, &file_size) == MIL_OK);
    mil_model *n = mil_open_memory(ctx, file, file_size);
    if (CHECK(n != NULL)) CHECK_STRING(mil_model_metadata(n, "note"), "caf\xc3\xa9");
    mil_model_free(m);
    mil_model_free(n);
    end();
}

// A caller's metadata never passes for the library's own.
TEST(reserved_metadata_keys_are_refused)
{
    begin();
    mil_model *m = mil_create(ctx, "abmil", SMALL);
    static const char *const keys[] = { "mil.model", "mil.config", "mil.classes", "mil.version", "format" };
    for (int k = 0; k < 5; k++) {
        CHECK(mil_model_set_metadata(m, keys[k], "x") == MIL_ERROR_ARGUMENT);
        CHECK_CONTAINS(mil_error(ctx), keys[k]);
    }
    mil_model_free(m);
    end();
}

// ---- a model of the user's own ----
typedef struct mean_config { int64_t in_dim, num_classes; } mean_config;
typedef struct mean_model { mil_linear_layer head; mil_param *seen; } mean_model;
static const mil_option mean_options[] = {
    { "in_dim", MIL_OPTION_INT, offsetof(mean_config, in_dim), "1024", "1..100000", "width of an instance" },
    { "num_classes", MIL_OPTION_INT, offsetof(mean_config, num_classes), "2", "1..100", "classes" }
};
static const mil_config mean_configs[] = { { "base", "" }, { "four", "num_classes=4" } };

static void mean_declare(mil_builder *b, void *model, const void *config)
{
    mean_model *m = (mean_model *)model;
    const mean_config *c = (const mean_config *)config;
    const mil_init zero = { MIL_INIT_CONSTANT, 0 };
    if (c->num_classes == 13) mil_declare_fail(b, MIL_ERROR_ARGUMENT, "13 classes bring bad luck");
    mil_declare_push(b, "parts.%d", 1);
    m->head = mil_declare_linear(b, c->in_dim, c->num_classes, 1, MIL_LINEAR_XAVIER, "head");
    m->seen = mil_declare_buffer(b, MIL_I64, zero, 0, NULL, "seen");
    mil_declare_pop(b);
    mil_declare_alias(b, m->head.weight, "old.W");
}

static void mean_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mean_model *m = (const mean_model *)model;
    (void)config;
    out->slide_feats = mil_squeeze(mil_mean(in->features, 1), 1);
    out->logits = mil_linear_forward(&m->head, out->slide_feats);
}

static mil_architecture mean_architecture(void)
{
    mil_architecture a;
    memset(&a, 0, sizeof a);
    a.name = "meanpool";
    a.title = "mean pooling";
    a.citation = "";
    a.prefix = "net.";
    a.options = mean_options;
    a.option_count = 2;
    a.config_size = sizeof(mean_config);
    a.configs = mean_configs;
    a.config_count = 2;
    a.model_size = sizeof(mean_model);
    a.head = "parts.1.head";
    a.declare = mean_declare;
    a.forward = mean_forward;
    return a;
}

TEST(a_users_model_is_made_saved_and_opened_like_any_other)
{
    const mil_architecture arch = mean_architecture();
    begin();
    refused("meanpool", NULL, MIL_ERROR_UNKNOWN, mil_create(ctx, "meanpool", NULL) ? "" : mil_error(ctx));     // not yet known
    CHECK(mil_register(ctx, &arch) == MIL_OK);
    CHECK(mil_register(ctx, NULL) == MIL_ERROR_ARGUMENT && mil_register(NULL, &arch) == MIL_ERROR_ARGUMENT);
    refused("meanpoll", NULL, MIL_ERROR_UNKNOWN, "no model \"meanpoll\"; did you mean \"meanpool\"? One of your own needs mil_register first");
    refused("meanpool", "num_classes=13", MIL_ERROR_ARGUMENT, "meanpool.base.uni.none: 13 classes bring bad luck");
    mil_model *m = mil_create(ctx, "meanpool.four.conch_v1", "in_dim=6");
    CHECK(mil_model_parameter_count(m) == 4 * 6 + 4 && mil_model_num_classes(m) == 4 && mil_model_param_count(m) == 3);
    CHECK(mil_model_architecture(m) == &arch);
    CHECK(mil_model_find(m, "old.W") == mil_model_find(m, "parts.1.head.weight"));
    *(int64_t *)mil_model_find(m, "parts.1.seen")->data = ((int64_t)1 << 60) + 1;          // more than a double holds
    file_size = sizeof file;
    CHECK(mil_save_memory(m, file, &file_size) == MIL_OK);
    CHECK(mil_model_init(m, 77) == MIL_OK);
    mil_model *n = mil_open_memory(ctx, file, file_size);
    CHECK(n && *(int64_t *)mil_model_find(n, "parts.1.seen")->data == ((int64_t)1 << 60) + 1);
    CHECK_STRING(mil_model_name(n), "meanpool.four.conch_v1.none");
    mil_tensors *t = NULL;
    CHECK(mil_tensors_open_memory(ctx, file, file_size, 0, &t) == MIL_OK);
    CHECK(mil_tensors_find(t, "net.parts.1.head.weight") >= 0);
    mil_tensors_free(t);
    CHECK(mil_load_memory(m, file, file_size, NULL) == MIL_OK || (puts(mil_error(ctx)), 0));
    CHECK(bits_of(m) == bits_of(n));
    mil_model_free(m);
    mil_model_free(n);
    mil_context_free(ctx);
    ctx = memory_context(&mem, 1, NULL);
    CHECK(mil_open_memory(ctx, file, file_size) == NULL && mil_error_status(ctx) == MIL_ERROR_UNKNOWN);        // another context does not know it
    end();
}

TEST(what_cannot_be_registered_is_refused)
{
    const mil_architecture arch = mean_architecture();
    mil_architecture other = arch;
    const mil_config more[] = { { "large", "in_dim=2048" } }, theirs[] = { { "mine", "" }, { "base", "" } };
    begin();
    CHECK(mil_register(ctx, &arch) == MIL_OK);
    CHECK(mil_register(ctx, &arch) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "mil_register: there is a model meanpool.base already");
    other.configs = more;                                  // more configs of a model are welcome
    other.config_count = 1;
    CHECK(mil_register(ctx, &other) == MIL_OK);
    mil_architecture abmil = arch;
    abmil.name = "abmil";
    abmil.configs = theirs;
    CHECK(mil_register(ctx, &abmil) == MIL_ERROR_ARGUMENT);
    CHECK_STRING(mil_error(ctx), "mil_register: there is a model abmil.base already");
    mil_architecture narrow = arch;
    narrow.name = "narrow";
    narrow.options = mean_options + 1;
    narrow.option_count = 1;
    CHECK(mil_register(ctx, &narrow) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "narrow has no option in_dim");
    mil_architecture empty = arch;                         // a count without the configs that it counts
    empty.name = "empty";
    empty.configs = NULL;
    CHECK(mil_register(ctx, &empty) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "mil_register: an architecture needs a name, a config");
    CHECK(mil_create(ctx, "empty", NULL) == NULL && mil_error_status(ctx) == MIL_ERROR_UNKNOWN);
    mil_context_free(ctx);
    CHECK(mem.bytes == 0);
}

TEST(a_bag_without_instances_is_named_in_its_own_shape)
{
    static mil_real x[6];
    mil_tape *tape = NULL;
    mil_outputs out;
    begin();
    mil_model *m = mil_create(ctx, "abmil", SMALL);
    const mil_tensor none = mil_tensor_matrix(x, MIL_REAL_DTYPE, 0, 6);
    mil_bag bag = mil_bag_from(&none);
    CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
    CHECK(mil_model_record(tape, m, &bag, NULL, &out) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "features [0, 6] hold no instance");
    mil_tensor padded = mil_tensor_matrix(x, MIL_REAL_DTYPE, 1, 6);           // a stride for the rows alone: one number per row
    padded.stride[0] = 6 * (int64_t)sizeof(mil_real);
    bag = mil_bag_from(&padded);
    mil_tape_reset(tape);
    CHECK(mil_model_record(tape, m, &bag, NULL, &out) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "stride[1] is 0");
    bag.features.stride[1] = (int64_t)sizeof(mil_real);
    mil_tape_reset(tape);
    CHECK(mil_model_record(tape, m, &bag, NULL, &out) == MIL_OK);
    bag = mil_bag_from(NULL);
    mil_tape_reset(tape);
    CHECK(mil_model_record(tape, m, &bag, NULL, &out) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "with data");
    mil_tape_free(tape);
    mil_model_free(m);
    end();
}

// ---- allocation failures ----
static mil_model *victim;

static int action(int which)                               // whether it worked
{
    static const char *const names[] = { "x", "y", "z" };
    mil_model *m = NULL;
    switch (which) {
    case 0: m = mil_create(ctx, "abmil", SMALL); break;
    case 1: return mil_load_memory(victim, file, file_size, NULL) == MIL_OK;
    case 2: { static char room[1 << 16]; size_t size = sizeof room; return mil_save_memory(victim, room, &size) == MIL_OK; }
    case 3: m = mil_open_memory(ctx, file, file_size); break;
    case 4: return mil_model_set_class_names(victim, names, 3) == MIL_OK;
    case 5: return mil_model_set_metadata(victim, "key", "a longer text than before") == MIL_OK;
    case 6: return mil_load(victim, path_of("m.safetensors")) == MIL_OK;
    case 7: return mil_save(victim, path_of("n.safetensors")) == MIL_OK;
    case 8: m = mil_open(ctx, path_of("m.safetensors")); break;
    default: m = mil_open(ctx, path_of("foreign.safetensors")); break;
    }
    mil_model_free(m);
    return m != NULL;
}

TEST(each_failing_allocation_is_an_error_without_a_leak_or_a_change)
{
    static const char *const classes[] = { "p", "q", "r" };
    static const char config[] = "{\"gate\": true, \"embed_dim\": 8, \"attn_dim\": 4, \"in_dim\": 6, \"num_classes\": 3}";
    begin();
    mil_model *source = mil_create(ctx, "abmil", SMALL);
    CHECK(mil_model_init(source, 2) == MIL_OK && mil_model_set_class_names(source, classes, 3) == MIL_OK && mil_model_set_metadata(source, "k", "v") == MIL_OK);
    state s = state_of(source, "model.");
    write_state(&s, NULL, 0);
    CHECK(mil_file_write(ctx, path_of("foreign.safetensors"), file, file_size) == MIL_OK);
    CHECK(mil_file_write(ctx, path_of("config.json"), config, strlen(config)) == MIL_OK);
    CHECK(mil_save(source, path_of("m.safetensors")) == MIL_OK);
    file_size = sizeof file;
    CHECK(mil_save_memory(source, file, &file_size) == MIL_OK);
    victim = mil_create(ctx, "abmil", SMALL);
    CHECK(mil_model_set_class_names(victim, classes, 3) == MIL_OK && mil_model_set_metadata(victim, "key", "old") == MIL_OK);
    for (int which = 0; which < 10; which++)
        for (int after = 0; after < 2; after++) {
            int done = 0;
            for (long at = 0; at < 2000 && !done; at++) {
                CHECK(mil_model_init(victim, 0) == MIL_OK && mil_model_set_metadata(victim, "key", "old") == MIL_OK);
                const size_t bytes = mil_context_bytes(ctx);
                const uint64_t bits = bits_of(victim);
                mem.fail_at = mem.calls + at;
                mem.fail_after = after;
                done = action(which);
                mem.fail_at = -1;
                const int status = mil_error_status(ctx);
                if (!done && !CHECK(status == MIL_ERROR_NO_MEMORY)) printf("action %d, allocation %ld: %s\n", which, at, mil_error(ctx));
                if (done) { CHECK(which == 5 || at > 0); break; }
                if (!CHECK(mil_context_bytes(ctx) == bytes || which == 5)) printf("action %d, allocation %ld: %d bytes, then %d\n", which, at, (int)bytes, (int)mil_context_bytes(ctx));
                CHECK(bits_of(victim) == bits);
                CHECK_STRING(mil_model_metadata(victim, "key"), "old");
                CHECK_STRING(mil_model_class_name(victim, 2), "r");
            }
            CHECK(done);
            CHECK(mil_model_set_class_names(victim, classes, 3) == MIL_OK);
        }
    mil_model_free(source);
    mil_model_free(victim);
    static const char *const left[] = { "m.safetensors", "n.safetensors", "foreign.safetensors", "config.json" };
    for (int i = 0; i < 4; i++) unlink(path_of(left[i]));
    CHECK(rmdir(folder) == 0);                             // nothing half-written is left
    folder[0] = 0;
    end();
}

// The filters of transmil's PPEG: Xavier's bound for one channel in and all out, each by its own number of taps.
TEST(position_filters_start_within_their_own_bounds)
{
    static const char *const keys[3] = { "pos_layer.proj.weight", "pos_layer.proj1.weight", "pos_layer.proj2.weight" };
    begin();
    mil_model *m = mil_create(ctx, "transmil", "in_dim=4 embed_dim=64");
    for (int k = 0; k < 3; k++) {
        const mil_param *p = mil_model_find(m, keys[k]);
        double most = 0;
        if (!CHECK(p && p->shape[2] == 7 - 2 * k)) continue;
        const double bound = sqrt(6 / ((double)(p->shape[2] * p->shape[3]) * (1 + 64)));
        for (int64_t e = 0; e < p->count; e++) most = fabs((double)((const mil_real *)p->data)[e]) > most ? fabs((double)((const mil_real *)p->data)[e]) : most;
        CHECK(most <= bound * (1 + 1e-6) && most > 0.9 * bound);
    }
    mil_model_free(m);
    end();
}

// The position filter of rrt's regional attention: Xavier's bound for one channel in and `heads` out, and not all alike.
TEST(fresh_position_filters_have_the_spread_of_the_reference)
{
    begin();
    mil_model *m = mil_create(ctx, "rrt", "in_dim=8 embed_dim=16 mlp_dim=16 n_heads=4 trans_dim=4 num_landmarks=4 apply_attn=true attn=rrt epeg=true");
    int filters = 0;
    if (CHECK(m != NULL))
        for (int64_t i = 0; i < mil_model_param_count(m); i++) {
            const mil_param *p = mil_model_param(m, i);
            const mil_real *w = (const mil_real *)p->data;
            if (!strstr(p->key, ".pe.weight")) continue;
            const double bound = sqrt(6 / (double)(p->shape[2] * (1 + p->shape[0])));
            double most = 0;
            for (int64_t k = 0; k < p->count; k++) most = fmax(most, fabs((double)w[k]));
            CHECK(most <= bound && most > bound / 2);
            filters++;
        }
    CHECK(filters > 0);
    mil_model_free(m);
    end();
}

TESTS(
    T(fresh_position_filters_have_the_spread_of_the_reference)
    T(short_names_are_filled_in)
    T(unknown_names_are_answered_with_the_nearest)
    T(options_that_make_no_sense_are_refused)
    T(options_come_as_pairs_or_json_and_the_later_wins)
    T(a_list_may_stand_on_several_lines)
    T(encoders_give_the_widths_of_the_reference)
    T(parameter_counts_are_those_of_the_reference)
    T(keys_are_found_with_and_without_prefixes)
    T(what_cannot_be_read_or_written_is_said)
    T(fresh_weights_keep_their_bounds_and_are_the_same_everywhere)
    T(saved_and_loaded_models_have_the_same_bytes)
    T(prefixes_of_wrappers_are_understood)
    T(weights_of_other_types_are_converted)
    T(files_that_do_not_fit_are_named_and_change_nothing)
    T(many_missing_names_are_counted)
    T(files_without_a_classifier_open_with_a_fresh_one)
    T(position_filters_start_within_their_own_bounds) T(a_file_that_lacks_a_tensor_is_no_models) T(a_config_with_dtype_and_torch_dtype_opens)
    T(a_new_head_takes_what_both_have)
    T(class_names_and_metadata_are_checked)
    T(metadata_that_is_no_utf8_is_refused_and_the_model_saves)
    T(reserved_metadata_keys_are_refused)
    T(a_users_model_is_made_saved_and_opened_like_any_other)
    T(what_cannot_be_registered_is_refused)
    T(a_bag_without_instances_is_named_in_its_own_shape)
    T(each_failing_allocation_is_an_error_without_a_leak_or_a_change)
)
