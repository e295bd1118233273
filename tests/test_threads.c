// build: float
// Contexts in several threads at once share nothing: with a pool each, with one host loop for all, and without any, scoring
// and training give the bits that they give alone. Meant for the thread sanitizer.
#include <pthread.h>
#include <stdlib.h>
#include "mil.h"
#include "check.h"

enum { N = 700, D = 24, RUNNERS = 3 };

// A host's loop: two threads besides the caller, started for each job.
typedef struct job { void (*task)(void *arg, int64_t index); void *arg; int64_t count, next; pthread_mutex_t mutex; } job;

static void *work(void *argument)
{
    job *j = (job *)argument;
    for (;;) {
        pthread_mutex_lock(&j->mutex);
        const int64_t i = j->next++;
        pthread_mutex_unlock(&j->mutex);
        if (i >= j->count) return NULL;
        j->task(j->arg, i);
    }
}

static void host_run(void *user, int64_t count, void (*task)(void *arg, int64_t index), void *arg)
{
    pthread_t thread[2];
    job j;
    (void)user;
    j.task = task;
    j.arg = arg;
    j.count = count;
    j.next = 0;
    pthread_mutex_init(&j.mutex, NULL);
    for (int i = 0; i < 2; i++) pthread_create(&thread[i], NULL, work, &j);
    work(&j);
    for (int i = 0; i < 2; i++) pthread_join(thread[i], NULL);
    pthread_mutex_destroy(&j.mutex);
}

typedef struct runner { int kind; const float *x; mil_real logits[2], trained[2]; mil_status status; } runner;

static void *run(void *argument)
{
    runner *r = (runner *)argument;
    mil_context *ctx = NULL;
    mil_context_options o = mil_context_options_default();
    o.threads = r->kind == 1 ? 3 : 1;
    if (r->kind == 2) { o.parallel.run = host_run; o.parallel.threads = 3; }
    if ((r->status = mil_context_create(&ctx, &o)) != MIL_OK) return NULL;
    mil_model *model = mil_create(ctx, "abmil", "in_dim=24 embed_dim=32 attn_dim=16");
    mil_scorer *scorer = model ? mil_scorer_create(model, NULL) : NULL;
    const mil_bag bag = mil_bag_make(r->x, N, D);
    r->status = mil_error_status(ctx);
    for (int i = 0; i < 4 && r->status == MIL_OK; i++) r->status = mil_scorer_score(scorer, &bag);
    if (r->status == MIL_OK) r->status = mil_scorer_read(scorer, MIL_LOGITS, r->logits, 2);
#ifndef MIL_NO_TRAINING
    mil_trainer *trainer = model ? mil_trainer_create(model, "optimizer=adamw lr=0.01") : NULL;
    const mil_target target = mil_target_class(1);
    if (r->status == MIL_OK) r->status = mil_error_status(ctx);
    for (int i = 0; i < 3 && r->status == MIL_OK; i++) r->status = mil_trainer_step(trainer, &bag, &target, NULL, r->trained);
    mil_trainer_free(trainer);
#endif
    if (r->status == MIL_OK) r->status = mil_selftest(ctx);
    if (r->status != MIL_OK) printf("  %s\n", mil_error(ctx));
    mil_scorer_free(scorer);
    mil_model_free(model);
    mil_context_free(ctx);
    return NULL;
}

TEST(contexts_in_several_threads_give_the_bits_of_one_alone)
{
    float *x = (float *)malloc(N * D * sizeof *x);
    runner alone, r[RUNNERS];
    pthread_t thread[RUNNERS];
    for (int i = 0; i < N * D; i++) x[i] = (float)(i * 31 % 67 - 33) / 32;
    memset(&alone, 0, sizeof alone);
    alone.x = x;
    run(&alone);
    CHECK(alone.status == MIL_OK);
    memset(r, 0, sizeof r);
    for (int k = 0; k < RUNNERS; k++) {
        r[k].kind = k;
        r[k].x = x;
        CHECK(pthread_create(&thread[k], NULL, run, &r[k]) == 0);
    }
    for (int k = 0; k < RUNNERS; k++) pthread_join(thread[k], NULL);
    for (int k = 0; k < RUNNERS; k++) {
        CHECK(r[k].status == MIL_OK);
        CHECK(memcmp(r[k].logits, alone.logits, sizeof alone.logits) == 0 && memcmp(r[k].trained, alone.trained, sizeof alone.trained) == 0);
    }
    free(x);
}

TESTS(T(contexts_in_several_threads_give_the_bits_of_one_alone))
