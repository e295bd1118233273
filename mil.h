// mil.h 0.1.0: deep Multiple Instance Learning (MIL) in one C header.
//
// Scores and trains attention-based MIL models (ABMIL and its relatives) on bags of patch features, from C99 or C++11,
// with libc and libm only. Models carry the names, options and state-dict keys of their reference code, so a checkpoint
// trained in Python loads here as it is, and one trained here loads there.
//
//     #define MIL_IMPLEMENTATION      // in exactly one .c or .cpp file
//     #include "mil.h"
//                                     // cc -O2 app.c -lm -lpthread
//
// Score a slide: features [N, 1024] from an encoder, weights saved by mil.h or by the reference code.
//
//     mil_context *ctx;
//     if (mil_context_create(&ctx, NULL) != MIL_OK) return 1;
//     mil_model *model = mil_create(ctx, "abmil.base.uni.none", "num_classes=2");
//     mil_scorer *scorer = mil_load(model, "weights.safetensors") == MIL_OK ? mil_scorer_create(model, NULL) : NULL;
//
//     mil_real logits[2];                                           // what is NULL fails on, and the first sentence stays
//     int ok = mil_scorer_push(scorer, features, n, 0, MIL_F32) == MIL_OK           // in one call, or as the patches come
//           && mil_scorer_read(scorer, MIL_LOGITS, logits, 2) == MIL_OK;
//     if (ok) printf("logits %.4f %.4f\n", (double)logits[0], (double)logits[1]);
//     else puts(mil_error(ctx));
//
//     mil_scorer_free(scorer);
//     mil_model_free(model);
//     mil_context_free(ctx);
//     return ok ? 0 : 1;
//
// What it does not do: it does not open slides, cut patches or run the patch encoder; it reads safetensors and NPY and no
// other format (tools/ converts); it is no general array library; it is not a medical device.
//
// Contents. Search for the tag to jump there.
//
//   >>options          macros that change the build
//   public half
//     >>basics         version, status, dtypes, tensors
//     >>context        memory, threads, errors
//     >>tape           record, then run
//     >>ops            what can be recorded
//     >>layers         linear, gated attention, ... with their parameters
//     >>models         create by name, parameters, load and save
//     >>bags           what a model is given, and what it answers
//     >>scoring        whole bags and streams of patches
//     >>training       losses, optimizers, one call per step
//     >>metrics        AUROC, kappa, calibration, bootstrap
//     >>files          safetensors, NPY, crash-safe writing
//     >>extending      your own ops, models and backends
//   implementation, each room using only rooms above it
//     >>platform       memory, threads, text
//     >>kernels        GEMM and vector maths per CPU
//     >>record         nodes, shapes, random draws
//     >>plan           stages, row groups, buffers
//     >>execute        the CPU backend, running a tape
//     >>op-table       every op: shape rule, kernel, gradient
//     >>layer-code     layers
//     >>json           a strict JSON reader
//     >>file-code      safetensors, NPY
//     >>model-code     options, registry, load, save
//     >>model-blocks   abmil, ...
//     >>loss-code      cross-entropy, binary cross-entropy
//     >>train-code     optimizers, schedules, trainer
//     >>score-code     scorer
//     >>metric-code    metrics
//     >>end            private macros are #undef'd
//
// Licence: MIT, text at the end of the file.

#ifndef MIL_H
#define MIL_H

// ==== >>options: macros that change the build =====================================================================
//
//   macro                 default      what it does
//   MIL_API               extern       what stands before public declarations, e.g. __declspec(dllexport); with extern "C" in C++
//   MIL_IMPLEMENTATION    off          compiles the implementation into this file; define it in one file of a program
//   MIL_STATIC            off          every function static: a private copy per file
//   MIL_REAL              float        arithmetic type, float or double (double: plain C kernels, for tests)
//   MIL_MALLOC, MIL_REALLOC, MIL_FREE  malloc, realloc, free; define all three or none
//   MIL_ASSERT(x)         nothing      checks of the library's own invariants, e.g. assert(x); never of what comes from outside
//   MIL_NO_STDIO          off          no files: weights from memory only, of <stdio.h> only snprintf and vsnprintf
//   MIL_NO_THREADS        off          no thread pool (a host's parallel_for still works)
//   MIL_NO_SIMD           off          plain C kernels only
//   MIL_NO_BF16           off          no products of bfloat16 (MIL_PRECISION_BF16 is full precision then): saves 4 KB on x86-64
//   MIL_NO_TRAINING       off          no gradients, losses, optimizers, trainer: about a third of the code
//   MIL_NO_METRICS        off          no metrics
//   MIL_ONLY_MODELS       off          only the models named by MIL_MODEL_ABMIL, MIL_MODEL_CLAM, ... are known to mil_create
//   MIL_USE_CBLAS         off          matrix products by cblas_sgemm / cblas_dgemm; results may then depend on threads
//   MIL_KEEP_PRIVATE_MACROS  off       leaves the MILI_ macros defined after the implementation, for tests of private parts

#include <stddef.h>
#include <stdint.h>

#ifndef MIL_REAL
#define MIL_REAL float
#define MIL_REAL_IS_FLOAT 1
#else
// `#if` cannot compare types, so the name is pasted into a macro that is 1 for double and float.
#define MILI_REAL_NAME_float 1
#define MILI_REAL_NAME_double 2
#define MILI_PASTE_(a, b) a##b
#define MILI_PASTE(a, b) MILI_PASTE_(a, b)
#if MILI_PASTE(MILI_REAL_NAME_, MIL_REAL) == 1
#define MIL_REAL_IS_FLOAT 1
#elif MILI_PASTE(MILI_REAL_NAME_, MIL_REAL) == 2
#define MIL_REAL_IS_FLOAT 0
#else
#error "mil.h: MIL_REAL is float or double"
#endif
#endif

#ifdef MIL_STATIC
#if defined(__GNUC__) || defined(__clang__)
#define MIL_API static __attribute__((unused))
#else
#define MIL_API static
#endif
#elif !defined(MIL_API)
#ifdef __cplusplus
#define MIL_API extern "C"
#else
#define MIL_API extern
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define MIL_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define MIL_PRINTF(text, first)
#endif

// ==== >>basics: version, status, dtypes, tensors ==================================================================

#define MIL_VERSION_MAJOR 0
#define MIL_VERSION_MINOR 1
#define MIL_VERSION_PATCH 0
#define MIL_VERSION "0.1.0"

typedef MIL_REAL mil_real;                               // what everything is computed in

// The version the implementation was compiled from, "major.minor.patch"; compare with MIL_VERSION of the header in use.
MIL_API const char *mil_version(void);

// X(constant, sentence)
#define MIL_STATUS_LIST(X)                                                                          \
    X(MIL_OK,                "no error")                                                            \
    X(MIL_ERROR_ARGUMENT,    "an argument is not what the function takes")                          \
    X(MIL_ERROR_SHAPE,       "shapes do not fit each other")                                        \
    X(MIL_ERROR_NO_MEMORY,   "the allocator returned no memory")                                    \
    X(MIL_ERROR_IO,          "the system could not read or write a file")                           \
    X(MIL_ERROR_FORMAT,      "a file or text breaks its format's rules")                            \
    X(MIL_ERROR_UNKNOWN,     "a name that does not exist: model, option, tensor, op")               \
    X(MIL_ERROR_UNSUPPORTED, "valid, but not offered here")                                         \
    X(MIL_ERROR_STATE,       "a call out of order")                                                 \
    X(MIL_ERROR_NUMERIC,     "a NaN or an infinity where a number was needed")                      \
    X(MIL_ERROR_BACKEND,     "the backend failed")

#define MILI_STATUS_ENUM(name, text) name,
typedef enum mil_status { MIL_STATUS_LIST(MILI_STATUS_ENUM) MIL_STATUS_COUNT } mil_status;
#undef MILI_STATUS_ENUM

// The constant's name ("MIL_ERROR_SHAPE") and its general sentence. The particular sentence is mil_error.
MIL_API const char *mil_status_name(mil_status status);
MIL_API const char *mil_status_text(mil_status status);

// X(constant, bytes, name in safetensors)
#define MIL_DTYPE_LIST(X)                                                                           \
    X(MIL_F32, 4, "F32") X(MIL_F64, 8, "F64") X(MIL_F16, 2, "F16") X(MIL_BF16, 2, "BF16")           \
    X(MIL_I8, 1, "I8")   X(MIL_U8, 1, "U8")   X(MIL_I16, 2, "I16") X(MIL_U16, 2, "U16")             \
    X(MIL_I32, 4, "I32") X(MIL_U32, 4, "U32") X(MIL_I64, 8, "I64") X(MIL_U64, 8, "U64")             \
    X(MIL_BOOL, 1, "BOOL")

#define MILI_DTYPE_ENUM(name, bytes, text) name,
typedef enum mil_dtype { MIL_DTYPE_LIST(MILI_DTYPE_ENUM) MIL_DTYPE_COUNT } mil_dtype;
#undef MILI_DTYPE_ENUM

#if MIL_REAL_IS_FLOAT
#define MIL_REAL_DTYPE MIL_F32
#else
#define MIL_REAL_DTYPE MIL_F64
#endif

MIL_API size_t      mil_dtype_size(mil_dtype dtype);      // bytes of one element; 0 for no dtype
MIL_API const char *mil_dtype_name(mil_dtype dtype);      // "F32", ...; "?" for no dtype

#define MIL_MAX_RANK 8

// A view of memory that somebody else owns. As an input the memory is only read, and may be unaligned.
// stride: bytes from one index to the next, per axis; all zero means packed, row-major. Else each axis counts: for rows with
// padding behind them stride[0] is the bytes of a padded row and stride[1] those of one element.
typedef struct mil_tensor {
    void     *data;
    mil_dtype dtype;
    int       rank;                                       // 0: a scalar, one element
    int64_t   shape[MIL_MAX_RANK];
    int64_t   stride[MIL_MAX_RANK];
} mil_tensor;

// Packed views. `data` is declared const because inputs are only read.
MIL_API mil_tensor mil_tensor_make(const void *data, mil_dtype dtype, int rank, const int64_t *shape);
MIL_API mil_tensor mil_tensor_matrix(const void *data, mil_dtype dtype, int64_t rows, int64_t cols);     // [rows, cols]
MIL_API int64_t    mil_tensor_count(const mil_tensor *t); // elements; -1 when the product overflows or t is malformed

// ==== >>context: memory, threads, errors ==========================================================================
//
// A context owns the allocator, the threads and the last error. Everything created from it is used by one thread at a
// time; two contexts never share anything, so two threads with a context each need no lock.

typedef struct mil_context mil_context;

// One function allocates and frees. Only the thread that calls the library calls it, never one of the pool.
//   block NULL, old_size 0: allocate new_size bytes, aligned for any C type; NULL when there is no memory.
//   new_size 0: free `block` of old_size bytes, result unused.
//   Both sizes: grow as realloc does. The library copies instead and never asks for it; a host's function may have it.
typedef struct mil_allocator {
    void *(*reallocate)(void *user, void *block, size_t old_size, size_t new_size);
    void *user;
} mil_allocator;

// A host's own threads. run calls task(arg, i) once for each i in 0..count-1, on any threads in any order, and returns
// when all have returned. `threads`: how many run at once at most, 0 as 1. Results do not depend on it. run is called by the thread that
// calls the library, one call at a time for a context; a task neither calls run again nor throws, and run must not throw past it.
typedef struct mil_parallel {
    void (*run)(void *user, int64_t count, void (*task)(void *arg, int64_t index), void *arg);
    void *user;
    int   threads;
} mil_parallel;

// Which kernels to use. AUTO takes the best that this CPU runs; the others are for tests.
typedef enum mil_cpu { MIL_CPU_AUTO, MIL_CPU_PLAIN, MIL_CPU_AVX2, MIL_CPU_AVX512, MIL_CPU_NEON } mil_cpu;

// How exactly linear layers multiply when no training tape records them. FULL: in mil_real. BF16: features and weights are rounded
// to bfloat16 (8 bits of precision), products are summed in float; about twice as fast where the CPU can (AVX512_BF16), and FULL
// where it cannot, so ask mil_context_precision. Logits then move by some thousandths: a choice to validate, never the default.
typedef enum mil_precision { MIL_PRECISION_FULL, MIL_PRECISION_BF16 } mil_precision;

typedef struct mil_backend mil_backend;

typedef struct mil_context_options {
    mil_allocator allocator;                              // reallocate NULL: MIL_MALLOC and friends
    void         *memory;                                 // a fixed block instead of an allocator: everything lives in it
    size_t        memory_size;                            // its bytes
    int           threads;                                // pool size, 0: one per CPU, 1: no pool
    mil_parallel  parallel;                               // run not NULL: used instead of a pool
    mil_cpu       cpu;
    mil_precision precision;
    const mil_backend *backend;                           // NULL: the CPU
} mil_context_options;

MIL_API mil_context_options mil_context_options_default(void);

// Files compiled with different MIL_REAL must not be linked together: the name makes the linker say so.
#if !MIL_REAL_IS_FLOAT
#define mil_context_create mil_context_create_f64
#endif

// Creates a context. options NULL: the defaults. *out is NULL on failure.
// Errors: MIL_ERROR_NO_MEMORY; MIL_ERROR_ARGUMENT (negative threads, a block too small, no such precision);
// MIL_ERROR_UNSUPPORTED (a CPU tier this machine lacks). There is no context to hold the sentence then; mil_status_text says what the code means.
MIL_API mil_status mil_context_create(mil_context **out, const mil_context_options *options);

// Frees the context and its threads. Models, tapes, scorers of it must have been freed before. NULL is fine.
MIL_API void mil_context_free(mil_context *ctx);

// The sentence of the last call that failed, "" when none did: names the place, the values and what was expected. The
// first error of a call wins. Valid until the next call with this context. Calls that return mil_status reset it.
MIL_API const char *mil_error(const mil_context *ctx);
MIL_API mil_status  mil_error_status(const mil_context *ctx);
MIL_API void        mil_error_clear(mil_context *ctx);

// Bytes of what has been made from the context and not been freed (models, tapes, scorers, the threads' pool), and the most there
// ever were. The allocator is asked for more: for each block up to 128 bytes, and for the context itself, about 1.3 kB.
MIL_API size_t mil_context_bytes(const mil_context *ctx);
MIL_API size_t mil_context_peak_bytes(const mil_context *ctx);

MIL_API const char *mil_context_cpu(const mil_context *ctx);   // name of the kernels in use: "avx512", "plain", ...
MIL_API int         mil_context_threads(const mil_context *ctx);
MIL_API mil_precision mil_context_precision(const mil_context *ctx);           // in use, whatever was asked for

// ==== >>tape: record, then run ====================================================================================
//
// Calling an op records a node; shapes and types are checked at the call, nothing is computed. mil_tape_run then plans
// memory for all that is needed and computes it. Only kept nodes (mil_node_keep), updates, and what they need are run.
//
// Errors are sticky: an op given NULL or a wrong shape returns NULL and the tape remembers the first error, so model code
// does not check; mil_tape_run (or mil_tape_status) reports it. A NULL itself records nothing, as there is no tape to tell: it is
// what an op that failed before has returned.
//
// Values are mil_real, row-major; index values are MIL_I64. A "row" is what the last axis runs over: [B, N, E] has B*N rows.

typedef struct mil_tape mil_tape;
typedef struct mil_node mil_node;
typedef struct mil_op mil_op;
typedef struct mil_param mil_param;

MIL_API mil_status mil_tape_create(mil_context *ctx, mil_tape **out);
MIL_API void       mil_tape_free(mil_tape *tape);              // NULL is fine
MIL_API void       mil_tape_reset(mil_tape *tape);             // forgets nodes, draws and the error; keeps memory, training, seed, step, options
MIL_API mil_context *mil_tape_context(mil_tape *tape);

// Training on: dropout drops, batch statistics are computed, and an op without a gradient on the way to a parameter is an
// error. Off at first. Applies to nodes recorded afterwards. With MIL_NO_TRAINING it stays off.
MIL_API void mil_tape_training(mil_tape *tape, int on);
MIL_API int  mil_tape_is_training(const mil_tape *tape);

// The random draws of a run are a function of (seed, step, name of the draw, element): the same on any machine and for any
// number of threads. Give each training step its own `step`.
MIL_API void mil_tape_seed(mil_tape *tape, uint64_t seed, uint64_t step);

// Supplies the draw called `name` ("shuffle", "mask") instead of the library's own. The memory must stay valid until the
// tape is reset. How many there are is checked where the draw is recorded; other dtypes are converted.
MIL_API void mil_tape_draw(mil_tape *tape, const char *name, const mil_tensor *values);

// Names the layer that is being recorded, for error sentences; pop as often as pushed.
MIL_API void mil_tape_push(mil_tape *tape, const char *layer);
MIL_API void mil_tape_pop(mil_tape *tape);

// Leaves. Inputs may be of any dtype and strided; `t->data` must stay valid until the tape has run. Where an op needs
// mil_real, rows are converted tile by tile.
MIL_API mil_node *mil_input(mil_tape *tape, const char *name, const mil_tensor *t);
MIL_API mil_node *mil_constant(mil_tape *tape, int rank, const int64_t *shape, double value);    // every element = value
MIL_API mil_node *mil_use(mil_tape *tape, mil_param *param);                                     // a parameter's value; the same node however often

// Points an input node at other memory of the same dtype, shape and strides, for running the same tape again.
MIL_API mil_status mil_input_set(mil_node *input, const void *data);

MIL_API void mil_node_keep(mil_node *node);                    // its value can be read after the run. NULL is fine
// Copies a kept value of `count` elements: int64_t where its dtype is MIL_I64, else mil_real, to which an input is converted.
MIL_API mil_status mil_node_read(mil_node *node, void *dst, int64_t count);

MIL_API mil_status mil_tape_status(const mil_tape *tape);      // MIL_OK or the first recording error, whose sentence is then in mil_error, too
MIL_API const char *mil_tape_error(const mil_tape *tape);      // the sentence of the first recording error, "" when there is none

// Bytes of workspace that the next mil_tape_run needs, so that a caller can decide before running. 0 when nothing is to be run and
// after an error, of the call as well, which is then the tape's: mil_error says which.
MIL_API size_t mil_tape_bytes(mil_tape *tape);

// The caller's block for the workspace, instead of the context's allocator; NULL gives it back, and with it end the values kept there.
// Aligned to 64, or a little is lost.
MIL_API void mil_tape_workspace(mil_tape *tape, void *memory, size_t bytes);

// Runs what has been recorded since the last run. A node of an earlier run can be used by later nodes when it was kept.
// Errors: the first recording error; MIL_ERROR_NO_MEMORY (the tape is as before); MIL_ERROR_STATE (an earlier value is gone).
MIL_API mil_status mil_tape_run(mil_tape *tape);

// Runs everything again, with the inputs' and parameters' present values and the present seed and step.
MIL_API mil_status mil_tape_rerun(mil_tape *tape);

typedef enum mil_tape_option {
    MIL_TAPE_NO_REUSE,       // every value has memory of its own, none is shared (to check the planner): 0 or 1
    MIL_TAPE_POISON,         // dead buffers are filled with NaN: 0 or 1
    MIL_TAPE_NO_GROUPS,      // no row streaming: 0 or 1
    MIL_TAPE_INPUT_GRADS,    // the features of recorded bags want a gradient (mil_node_grad(out.features)): 0 or 1
    MIL_TAPE_RECOMPUTE       // the backward pass recomputes row-wise values instead of storing them: 0 or 1
} mil_tape_option;
MIL_API void mil_tape_set(mil_tape *tape, mil_tape_option option, int value);

#ifndef MIL_NO_TRAINING
// Records the gradient of `loss` (one element) by everything it depends on that wants one: parameters, and inputs marked
// with mil_node_want_grad. Gradients are nodes like others. Once per tape, and before the first run of what it goes through: it
// reads values of the way that nobody keeps.
MIL_API mil_status mil_tape_backward(mil_tape *tape, mil_node *loss);
// The same for sum_i <y[i], dy[i]>: parts with several results and no loss. dy[i] has y[i]'s shape.
MIL_API mil_status mil_tape_backward_from(mil_tape *tape, mil_node *const *y, mil_node *const *dy, int count);
MIL_API void       mil_node_want_grad(mil_node *input);        // before an op reads it, else the tape fails
// NULL when the loss does not depend on x. A parameter's: mil_node_grad(mil_use(tape, param)).
MIL_API mil_node  *mil_node_grad(mil_node *x);
#endif

// ==== >>ops: what can be recorded =================================================================================
//
// Shapes are checked at the call. Axes may be negative: -1 is the last. Reductions keep the axis with length 1.
// Broadcasting is NumPy's: axes are aligned at the end, length 1 repeats.

// X(op, formula): element by element, any shape.
#define MIL_UNARY_LIST(X)                                                                           \
    X(exp,        "e^x")                                                                            \
    X(log,        "natural logarithm")                                                              \
    X(sqrt,       "square root")                                                                    \
    X(square,     "x^2")                                                                            \
    X(abs,        "|x|; gradient 0 at 0")                                                           \
    X(reciprocal, "1 / x")                                                                          \
    X(tanh,       "tanh x")                                                                         \
    X(sigmoid,    "1 / (1 + e^-x)")                                                                 \
    X(relu,       "max(x, 0); gradient 0 at 0")                                                     \
    X(gelu,       "x/2 (1 + erf(x / sqrt 2)), the exact form")                                      \
    X(silu,       "x sigmoid(x)")                                                                   \
    X(softplus,   "log(1 + e^x)")

#define MILI_UNARY_DECLARE(name, text) MIL_API mil_node *mil_##name(mil_node *x);
MIL_UNARY_LIST(MILI_UNARY_DECLARE)
#undef MILI_UNARY_DECLARE

MIL_API mil_node *mil_leaky_relu(mil_node *x, double slope);           // x > 0 ? x : slope x
MIL_API mil_node *mil_clamp(mil_node *x, double low, double high);     // gradient 0 outside
MIL_API mil_node *mil_affine(mil_node *x, double scale, double shift); // scale x + shift
MIL_API mil_node *mil_add(mil_node *a, mil_node *b);
MIL_API mil_node *mil_sub(mil_node *a, mil_node *b);
MIL_API mil_node *mil_mul(mil_node *a, mil_node *b);
MIL_API mil_node *mil_div(mil_node *a, mil_node *b);
MIL_API mil_node *mil_maximum(mil_node *a, mil_node *b);               // gradient to a where equal
MIL_API mil_node *mil_minimum(mil_node *a, mil_node *b);

// Where mask is 0: `value`, even if x is NaN there; elsewhere x. mask broadcasts to x's shape and has no gradient.
MIL_API mil_node *mil_mask_fill(mil_node *x, mil_node *mask, double value);

// Shapes. A reshape copies nothing.
MIL_API mil_node *mil_reshape(mil_node *x, int rank, const int64_t *shape);          // one length may be -1
MIL_API mil_node *mil_squeeze(mil_node *x, int axis);                                // drops an axis of length 1
MIL_API mil_node *mil_permute(mil_node *x, const int *axes);                         // y's axis i is x's axis axes[i]
MIL_API mil_node *mil_transpose(mil_node *x);                                        // swaps the last two axes
MIL_API mil_node *mil_concat(mil_node *const *x, int count, int axis);
MIL_API mil_node *mil_slice(mil_node *x, int axis, int64_t start, int64_t length);
MIL_API mil_node *mil_pad(mil_node *x, int axis, int64_t before, int64_t after);     // with zeros
MIL_API mil_node *mil_broadcast(mil_node *x, int rank, const int64_t *shape);        // repeats axes of length 1
MIL_API mil_node *mil_sum_to(mil_node *x, int rank, const int64_t *shape);           // the reverse: sums what was repeated
MIL_API mil_node *mil_detach(mil_node *x);                                           // same value, no gradient

// Reductions over one axis, which stays with length 1.
MIL_API mil_node *mil_sum(mil_node *x, int axis);
MIL_API mil_node *mil_mean(mil_node *x, int axis);
MIL_API mil_node *mil_max(mil_node *x, int axis);                      // gradient to the first maximum
MIL_API mil_node *mil_min(mil_node *x, int axis);
MIL_API mil_node *mil_logsumexp(mil_node *x, int axis);                // all -inf gives -inf
MIL_API mil_node *mil_argmax(mil_node *x, int axis);                   // MIL_I64, the lowest index of the maximum
MIL_API mil_node *mil_sum_all(mil_node *x);                            // [] one element

// Softmax over one axis. A slice that is all -inf (every instance masked) gives zeros; a NaN spoils its own slice only.
MIL_API mil_node *mil_softmax(mil_node *x, int axis);
MIL_API mil_node *mil_log_softmax(mil_node *x, int axis);

// Matrix products.
MIL_API mil_node *mil_matmul(mil_node *a, mil_node *b);                // a [.., n, k] b [.., k, m] -> [.., n, m]; leading axes broadcast
MIL_API mil_node *mil_matmul_t(mil_node *a, mil_node *b, int transpose_a, int transpose_b);   // with either one's last two axes swapped
MIL_API mil_node *mil_linear(mil_node *x, mil_node *weight, mil_node *bias);   // x [.., in] weight [out, in] bias [out] or NULL -> [.., out]

// Attention pooling: z[b,k] = sum_n softmax_n(scores[b,:,k])[n] values[b,n].  scores [B, N, K], values [B, N, E] -> [B, K, E].
// One pass with a running maximum (Milakov and Gimelshein 2018, section 3). A column of scores that is all -inf gives zeros.
MIL_API mil_node *mil_softmax_pool(mil_node *scores, mil_node *values);

// Normalisation over the last axis: (x - mean) / sqrt(var + eps), biased variance, times weight plus bias ([E] each, or both NULL).
MIL_API mil_node *mil_layer_norm(mil_node *x, mil_node *weight, mil_node *bias, double eps);

// Selection. Index nodes are MIL_I64 and carry no gradient.
MIL_API mil_node *mil_gather(mil_node *x, mil_node *index, int axis);  // x [.., n, ..], index [k] -> [.., k, ..]
MIL_API mil_node *mil_scatter_add(mil_node *x, mil_node *index, int axis, int64_t length);   // the reverse: zeros [.., length, ..] plus x at index
MIL_API mil_node *mil_one_hot(mil_node *index, int64_t classes);       // [..] -> [.., classes]

// Random draws, named (see mil_tape_seed, mil_tape_draw). The same name drawn twice on a tape gives two draws: "mask", "mask.1", ...
MIL_API mil_node *mil_random_uniform(mil_tape *tape, const char *name, int rank, const int64_t *shape);    // in [0, 1)
MIL_API mil_node *mil_random_normal(mil_tape *tape, const char *name, int rank, const int64_t *shape);
MIL_API mil_node *mil_random_permutation(mil_tape *tape, const char *name, int64_t n);                     // MIL_I64 [n]
// Inverted dropout: in training an element is kept with probability 1 - rate and divided by that; else x itself.
MIL_API mil_node *mil_dropout(mil_node *x, double rate, const char *name);

// Attention. Head h is columns h d .. h d + d - 1 of q and k and h e .. of v, as a linear layer leaves them:
//   q [B, N, H d]  k [B, M, H d]  v [B, M, H e] -> [B, N, H e],   row i of head h: sum_j p[i,j] v[j],
//   p[i,:] = softmax over j of scale <q[i], k[j]>;   scale 0: 1 / sqrt(d)
// key_mask [B, M] (NULL: none): keys with 0 take no part; a query without any key gives zeros. dropout: on p, in training; a
// draw supplied under the name `draw` is [B, H, N, M], 1 = kept. No [N, M] matrix is stored, forward or backward: tiles with a
// running maximum (Dao, Fu, Ermon, Rudra, Re 2022). With up to 512 keys the queries are streamed by rows.
MIL_API mil_node *mil_attention(mil_node *q, mil_node *k, mil_node *v, int64_t heads, double scale, mil_node *key_mask, double dropout, const char *draw);
// p itself (without dropout), averaged over heads, for queries first .. first + count - 1 of a mil_attention: [B, count, M]. A report:
// no gradient.
MIL_API mil_node *mil_attention_weights(mil_node *attention, int64_t first, int64_t count);

// Means of equal runs of rows: x [B, n, C] -> [B, runs, C], with `before` rows of zeros thought in front; runs divides before + n.
MIL_API mil_node *mil_run_mean(mil_node *x, int64_t runs, int64_t before);
MIL_API mil_node *mil_identity_minus(mil_node *x, double a);           // a I - x, for square matrices on the last two axes

// Depth-wise convolutions (cross-correlations) with zeros outside; the result has x's shape. Filter g of G serves C / G
// channels: G = C gives each channel its own. bias [G] or NULL.
MIL_API mil_node *mil_conv_grid(mil_node *x, mil_node *weight, mil_node *bias);      // x [B, H, W, C], weight [G, 1, kh, kw], centred at kh / 2, kw / 2
// The same on tokens x [B, skip + H W, C], W = width, whose first `skip` are no part of the grid: the result is 0 there.
MIL_API mil_node *mil_conv_tokens(mil_node *x, mil_node *weight, mil_node *bias, int64_t skip, int64_t width);
// y[t] = bias + sum_j weight[j] x[t + j - before] along the rows: k / 2 is centred, k - 1 causal.  x [B, N, C], weight [G, 1, k] (or [G, 1, k, 1])
MIL_API mil_node *mil_conv_rows(mil_node *x, mil_node *weight, mil_node *bias, int64_t before);
// The same along the rows of maps [.., G, N, M], filter g for all of map g (EPEG on attention scores).
MIL_API mil_node *mil_conv_maps(mil_node *x, mil_node *weight, mil_node *bias, int64_t before);

// Order. MIL_I64 indices along the axis; equal values by index, a NaN counts as the best.
MIL_API mil_node *mil_topk(mil_node *x, int64_t k, int axis, int largest);           // the k largest (or smallest), best first
MIL_API mil_node *mil_argsort(mil_node *x, int axis, int descending);                // all of them; stable
// For each row of q [B, N, E] the k rows of t [B, M, E] with the largest dot product, best first: MIL_I64 [B, N, k].
MIL_API mil_node *mil_nearest(mil_node *q, mil_node *t, int64_t k);
// x [B, N, E] by index [B, M, k] -> [B, M, k E]: k rows of x side by side. An index outside gives NaN.
MIL_API mil_node *mil_gather_rows(mil_node *x, mil_node *index);

// Smooth top-1 SVM loss (Berrada, Zisserman, Kumar 2018), mean over the rows of scores [R, C]; labels [R] MIL_I64.
MIL_API mil_node *mil_smooth_svm(mil_node *scores, mil_node *labels, double alpha, double tau);
// Stochastic depth: in training each x[i, ..] is kept with probability 1 - rate and divided by that, or zeroed. Draw [B, 1, ..].
MIL_API mil_node *mil_drop_path(mil_node *x, double rate, const char *draw);

// After everything else of the run, writes value into the parameter's memory (as many elements).
MIL_API void mil_update(mil_param *param, mil_node *value);

// ==== >>layers: parts with parameters =============================================================================
//
// A layer is a struct of parameters; mil_declare_* creates them under the reference's state-dict key, mil_*_forward records
// the equations. See >>extending for how a model of your own uses them.

typedef struct mil_builder mil_builder;                    // what a model is declared with

// Activations by name.
typedef enum mil_activation { MIL_ACT_NONE, MIL_ACT_RELU, MIL_ACT_LEAKY_RELU, MIL_ACT_GELU, MIL_ACT_SILU, MIL_ACT_TANH, MIL_ACT_SIGMOID, MIL_ACT_COUNT } mil_activation;
MIL_API mil_node *mil_activate(mil_node *x, mil_activation activation);

// Lists among options.
#define MIL_OPTION_TEXT_SIZE 32
#define MIL_OPTION_LIST_SIZE 16
typedef struct mil_int_list { int count; int64_t value[MIL_OPTION_LIST_SIZE]; } mil_int_list;
typedef struct mil_text_list { int count; char value[MIL_OPTION_LIST_SIZE][MIL_OPTION_TEXT_SIZE]; } mil_text_list;

// How a parameter starts. `a`: the bound of uniform, the deviation of normal, the value of constant, the first of a range (a, a+1, ...).
typedef enum mil_init_kind { MIL_INIT_CONSTANT, MIL_INIT_UNIFORM, MIL_INIT_NORMAL, MIL_INIT_RANGE } mil_init_kind;
typedef struct mil_init { mil_init_kind kind; double a; } mil_init;

// Declares one parameter. key: printf-like, appended to the scopes pushed so far ("blocks.0" + "." + key).
// Returns NULL after an error, which the builder keeps; mil_create then fails with it.
MIL_API mil_param *mil_declare(mil_builder *b, mil_init init, int rank, const int64_t *shape, const char *key, ...) MIL_PRINTF(5, 6);
// A tensor that is saved and loaded but not trained (batch statistics, labels of a loss). dtype MIL_REAL_DTYPE or MIL_I64.
MIL_API mil_param *mil_declare_buffer(mil_builder *b, mil_dtype dtype, mil_init init, int rank, const int64_t *shape, const char *key, ...) MIL_PRINTF(6, 7);
MIL_API void mil_declare_alias(mil_builder *b, mil_param *param, const char *key, ...) MIL_PRINTF(3, 4);   // another key that loads into it
MIL_API void mil_declare_push(mil_builder *b, const char *scope, ...) MIL_PRINTF(2, 3);
MIL_API void mil_declare_pop(mil_builder *b);
// Reports that the options do not fit each other; mil_create fails with this sentence.
MIL_API void mil_declare_fail(mil_builder *b, mil_status status, const char *format, ...) MIL_PRINTF(3, 4);

// y = x W^T + b.  W [out, in], b [out] or NULL. Keys `key.weight`, `key.bias`.
typedef struct mil_linear_layer { mil_param *weight, *bias; } mil_linear_layer;
typedef enum mil_linear_init {
    MIL_LINEAR_KAIMING,      // weight uniform in +-sqrt(6 / in), bias 0                  (MIL-Lab)
    MIL_LINEAR_TORCH,        // weight and bias uniform in +-1 / sqrt(in)                 (torch's default)
    MIL_LINEAR_XAVIER        // weight uniform in +-sqrt(6 / (in + out)), bias 0
} mil_linear_init;
MIL_API mil_linear_layer mil_declare_linear(mil_builder *b, int64_t in, int64_t out, int bias, mil_linear_init init, const char *key, ...) MIL_PRINTF(6, 7);
MIL_API mil_node *mil_linear_forward(const mil_linear_layer *layer, mil_node *x);      // [.., in] -> [.., out]

// Layer norm over the last axis. Keys `key.weight`, `key.bias` [E].
typedef struct mil_norm_layer { mil_param *weight, *bias; double eps; } mil_norm_layer;
MIL_API mil_norm_layer mil_declare_layer_norm(mil_builder *b, int64_t width, double eps, const char *key, ...) MIL_PRINTF(4, 5);
MIL_API mil_node *mil_layer_norm_forward(const mil_norm_layer *layer, mil_node *x);

// MIL-Lab's patch MLP: `layers` times linear and relu, dropout after each but the last. Keys `key.0`, `key.3`, `key.6`, ...
#define MIL_MLP_MAX_LAYERS 16
typedef struct mil_patch_mlp { mil_linear_layer linear[MIL_MLP_MAX_LAYERS]; int64_t layers; double dropout; } mil_patch_mlp;
MIL_API mil_patch_mlp mil_declare_patch_mlp(mil_builder *b, int64_t in, int64_t width, int64_t layers, double dropout, const char *key);
MIL_API mil_node *mil_patch_mlp_forward(const mil_patch_mlp *layer, mil_node *x);      // [.., in] -> [.., width]

// The attention scorer of Ilse, Tomczak, Welling 2018: one raw score per instance, before any softmax.
//   plain (eq. 8):  s = w tanh(V h)            keys `module.0`, `module.3`
//   gated (eq. 9):  s = w (tanh(V h) * sigmoid(U h))    keys `attention_a.0`, `attention_b.0`, `attention_c`
// h [.., E] -> [.., K]. V, U [A, E], w [K, A].
typedef struct mil_attention_scorer { mil_linear_layer V, U, w; int gated; mil_activation activation; double dropout; } mil_attention_scorer;
MIL_API mil_attention_scorer mil_declare_attention_scorer(mil_builder *b, int64_t in, int64_t width, int64_t heads, int gated, double dropout, const char *key);
MIL_API mil_node *mil_attention_scores(const mil_attention_scorer *layer, mil_node *h);
// The same with torchmil's keys `fc1.module`, `fc_gated.module`, `fc2` (without bias) and a choice of activation in place of tanh.
MIL_API mil_attention_scorer mil_declare_attention_pool(mil_builder *b, int64_t in, int64_t width, mil_activation activation, int gated, const char *key);

// An MLP given by lists of widths and activations (torchmil's MLP). Keys `key.i`, i counting linear layers and activations.
// An activation is known by the part relu, sigmoid or tanh in its name; any other is none. Returns the last width.
typedef struct mil_mlp { mil_linear_layer linear[MIL_OPTION_LIST_SIZE]; mil_activation activation[MIL_OPTION_LIST_SIZE]; int layers; } mil_mlp;
MIL_API int64_t mil_declare_mlp(mil_builder *b, int64_t in, const mil_int_list *sizes, const mil_text_list *activations, mil_mlp *out, const char *key);
MIL_API mil_node *mil_mlp_forward(const mil_mlp *layer, mil_node *x);

// Multi-head attention as torch has it: Q = q Wq^T + bq, likewise K and V, heads side by side, out = attention(Q, K, V) Wo^T + bo.
// Keys `key.in_proj_weight` [3E, E] (Wq, Wk, Wv stacked), `key.in_proj_bias` [3E], `key.out_proj`.
typedef struct mil_mha_layer { mil_param *weight, *bias; mil_linear_layer out; int64_t heads; double dropout; } mil_mha_layer;
MIL_API mil_mha_layer mil_declare_mha(mil_builder *b, int64_t width, int64_t heads, double dropout, mil_linear_init out_init, const char *key, ...) MIL_PRINTF(6, 7);
// q [B, n, E], k and v [B, m, E] -> [B, n, E]. *attention (NULL: not wanted) gets the node for mil_attention_weights.
MIL_API mil_node *mil_mha_forward(const mil_mha_layer *layer, mil_node *q, mil_node *k, mil_node *v, mil_node *key_mask, mil_node **attention);

// Nystrom attention (Xiong et al., Nystromformer, AAAI 2021) with m landmarks q~, k~, the means of runs of rows:
//   softmax(q k~^T) pinv(softmax(q~ k~^T)) softmax(q~ k^T) v + conv(v)
// in O(N m) time, and memory for no N x m matrix. n rows become a multiple of m by zero rows in front, which count as keys.
typedef struct mil_nystrom_options {
    int64_t in_dim, heads, head_dim, landmarks;
    int64_t out_dim;                                      // of the output layer; 0: there is none
    int64_t taps;                                         // of the residual convolution over v, one filter per head; 0: none
    int64_t iterations;                                   // of the pseudo-inverse
    int     per_matrix;                                   // its start is scaled by each matrix's own norms, not by the largest of all
    int     out_bias, qkv_bias;
    double  dropout;                                      // after the output layer
    mil_linear_init init;
    const char *qkv, *out, *conv;                         // keys
} mil_nystrom_options;
MIL_API mil_nystrom_options mil_nystrom_options_default(int64_t in_dim, int64_t heads, int64_t head_dim, int64_t landmarks);   // MIL-Lab's

typedef struct mil_nystrom_layer { mil_nystrom_options o; mil_param *qkv, *qkv_bias, *conv; mil_linear_layer out; } mil_nystrom_layer;
MIL_API mil_nystrom_layer mil_declare_nystrom(mil_builder *b, const mil_nystrom_options *options, const char *key, ...) MIL_PRINTF(3, 4);

// What a forward pass computed, for mil_nystrom_weights.
typedef struct mil_nystrom_parts { mil_node *q, *k, *q_marks, *k_marks, *inverse, *pool; int64_t padding; } mil_nystrom_parts;
// x [B, n, in_dim] -> the first `rows` rows (-1: all) of [B, n, out_dim]: later rows cost nothing when they are not wanted. mask
// [B, n] or NULL: missing rows are no keys and no part of landmarks (torchmil's rules). parts: NULL when not wanted.
MIL_API mil_node *mil_nystrom_forward(const mil_nystrom_layer *layer, mil_node *x, mil_node *mask, int64_t rows, mil_nystrom_parts *parts);
// Row `row` of the approximate attention matrix over the n keys, per head: [B, H, n]. Entries may be negative. Without a mask.
MIL_API mil_node *mil_nystrom_weights(const mil_nystrom_layer *layer, const mil_nystrom_parts *parts, int64_t row);

// Approximate Moore-Penrose inverse of a [.., m, m] by the iteration of Razavi et al. 2014 that Nystromformer uses:
//   Z_0 = A^T / (c r),  Z <- 1/4 Z (13 I - A Z (15 I - A Z (7 I - A Z)));   c, r: the largest row and column sum of |A|, over all
// matrices (per_matrix 0) or each matrix's own.
MIL_API mil_node *mil_pseudo_inverse(mil_node *a, int64_t iterations, int per_matrix);

// Positions by convolution: y = x + sum_i conv_i(x), depth-wise, k_i x k_i, with bias, on tokens x [B, skip + H W, C] that make a
// grid of that width; the first `skip` (a class token) pass by. PPEG (TransMIL): kernels 7, 5, 3; PEG: one. Keys `key.proj`, `key.proj1`, `key.proj2`: weight [C, 1, k, k], bias [C]. The kernels are folded into one.
typedef struct mil_ppeg_layer { mil_param *weight[3], *bias[3]; int count; } mil_ppeg_layer;
MIL_API mil_ppeg_layer mil_declare_ppeg(mil_builder *b, int64_t width, const int64_t *kernels, int count, mil_linear_init init, const char *key, ...) MIL_PRINTF(6, 7);
MIL_API mil_node *mil_ppeg_forward(const mil_ppeg_layer *layer, mil_node *x, int64_t skip, int64_t width);

// Tokens as square regions. L rows, and zero rows behind them up to side^2, make a grid of side x side tokens, cut into squares of
// `region` x `region`: [B, L, E] -> [B R, region^2, E], R = (side / region)^2, regions and tokens row by row; and back to the first L rows.
MIL_API mil_node *mil_regions_split(mil_node *x, int64_t side, int64_t region);
MIL_API mil_node *mil_regions_join(mil_node *x, int64_t bags, int64_t side, int64_t region, int64_t rows);

// Region attention (R-MSA, Tang et al., CVPR 2024): multi-head attention within each region. epeg > 0: the scores of each head get
// their convolution along the queries (that many taps, with bias) added. Keys `key.qkv` [3 H d, in], `key.proj`, `key.pe` [H, 1, epeg, 1].
typedef struct mil_region_attention { mil_linear_layer qkv, proj; mil_param *pe, *pe_bias; int64_t heads, epeg; double dropout; } mil_region_attention;
MIL_API mil_region_attention mil_declare_region_attention(mil_builder *b, int64_t in, int64_t heads, int64_t head_dim, int qkv_bias, int64_t epeg, double dropout,
                                                          mil_linear_init init, const char *key, ...) MIL_PRINTF(9, 10);
MIL_API mil_node *mil_region_attention_forward(const mil_region_attention *layer, mil_node *x);      // [R, n, in] -> [R, n, in]

// ==== >>models: create by name, parameters, load and save =========================================================

typedef struct mil_model mil_model;

// Creates a model with fresh weights (seed 0; mil_model_init for others).
//   name     `<model>.<config>.<encoder>.<task>`, short names filled in: "abmil" = "abmil.base.uni.none". The encoder gives
//            in_dim (mil_encoder_at lists them). A task other than "none" says that weights will be loaded.
//            Models and configs: mil_architecture_at(i)->name, ->configs (>>extending).
//   options  "key=value key=value", blanks or commas between, none around the =, the reference's keyword names; NULL or "" for none. Later wins.
//            Lists: "a=[1,2]". The options of a model with type, default, range and meaning: mil_model_architecture(m)->options,
//            or mil_architecture_at(i)->options without a model; `mil models NAME` prints them.
// Returns NULL on error: an unknown model, config, encoder or option (the sentence names the nearest known one), an
// ill-typed value, options that do not fit each other, no memory.
MIL_API mil_model *mil_create(mil_context *ctx, const char *name, const char *options);
MIL_API void mil_model_free(mil_model *model);                                      // NULL is fine
MIL_API mil_context *mil_model_context(const mil_model *model);

MIL_API const char *mil_model_name(const mil_model *model);                         // full, four parts
MIL_API int64_t mil_model_in_dim(const mil_model *model);
MIL_API int64_t mil_model_num_classes(const mil_model *model);                      // C; 0: no classifier, slide_feats and attention only, logits NULL
MIL_API int64_t mil_model_parameter_count(const mil_model *model);                  // trainable numbers
MIL_API int64_t mil_encoder_dim(const char *encoder);                               // 0 when unknown
MIL_API int64_t mil_encoder_count(void);
MIL_API const char *mil_encoder_at(int64_t i);                                      // its name; NULL outside 0..count-1

// The value of option `key` as text ("512", "true", "relu"); NULL for an unknown key. Valid until the model is freed.
MIL_API const char *mil_model_option(const mil_model *model, const char *key);
// All options as a JSON object, as `config` in a case file. Writes at most `size` bytes with the final 0; returns the length needed.
MIL_API size_t mil_model_config(const mil_model *model, char *dst, size_t size);

// Class names, saved with the weights; count must be num_classes. Copied.
MIL_API mil_status mil_model_set_class_names(mil_model *model, const char *const *names, int64_t count);
MIL_API const char *mil_model_class_name(const mil_model *model, int64_t i);        // NULL when none were set
// Any other text to save beside the weights ("mil.note"); value NULL removes it. Copied. Keys that mil_save writes itself
// ("format", "mil.model", "mil.config", "mil.classes", "mil.version") are MIL_ERROR_ARGUMENT.
MIL_API mil_status mil_model_set_metadata(mil_model *model, const char *key, const char *value);
MIL_API const char *mil_model_metadata(const mil_model *model, const char *key);    // NULL when absent

// Parameters, in the order of declaration. Fields are read-only but for the memory at `data`.
struct mil_param {
    const char *key;                                      // state-dict key, without the model's prefix
    mil_dtype   dtype;                                    // MIL_REAL_DTYPE, or MIL_I64 for some buffers
    int         rank;
    int64_t     shape[MIL_MAX_RANK];
    int64_t     count;                                    // elements
    int         trainable;                                // 0: a buffer
    int         frozen;                                   // 1: not trained for now (mil_param_freeze)
    void       *data;                                     // backend memory; on the CPU readable and writable (then count version up)
    mil_real   *grad;                                     // sum of gradients since the last step, or NULL
    mil_init    init;
    mil_model  *model;
    int64_t     version;                                  // counts changes, so that packed copies are renewed
    void       *packed;                                   // private
    size_t      packed_bytes;
};
MIL_API int64_t    mil_model_param_count(const mil_model *model);
MIL_API mil_param *mil_model_param(const mil_model *model, int64_t i);
MIL_API mil_param *mil_model_find(const mil_model *model, const char *key);         // with or without prefix; NULL when absent
// Copies a parameter's value out or in; count must be param->count. Writing counts as a change. Errors: MIL_ERROR_ARGUMENT (NULL,
// another count, a buffer that is not of mil_real); MIL_ERROR_STATE when writing while a trainer's averaged weights are swapped in,
// as for mil_model_init.
MIL_API mil_status mil_param_read(const mil_param *param, mil_real *dst, int64_t count);
MIL_API mil_status mil_param_write(mil_param *param, const mil_real *src, int64_t count);
MIL_API void mil_param_freeze(mil_param *param, int on);
MIL_API mil_status mil_model_init(mil_model *model, uint64_t seed);                 // fresh weights by the reference's rules

// What a load may find beside the weights; mil_error's sentence lists the names.
typedef struct mil_load_options {
    int allow_missing;       // tensors that the file lacks keep their values (else an error that names them)
    int allow_extra;         // tensors that the model lacks are skipped (else an error that names them)
    int new_head;            // the classification head keeps its present values (fresh in a model just created), whatever the file has of it
    int check_finite;        // NaN or infinity in a weight is an error (default 1)
} mil_load_options;
MIL_API mil_load_options mil_load_options_default(void);

// Loads weights by their state-dict keys; keys may all carry the prefix `model.` or `module.`, or none.
// Missing, extra and mis-shaped tensors are named in one sentence; the model is unchanged unless MIL_OK is returned.
// A file without the classifier (FEATHER) loads with new_head.
// A trainer of the model may live meanwhile: it goes on from the new weights with its old moments, counters and averages (to
// start anew, make a new trainer); MIL_ERROR_STATE while the averaged weights are swapped in. Scorers take the new weights at the
// next bag.
// A snapshot of the weights in memory, as for early stopping: mil_save_memory, and mil_load_memory to go back to it.
MIL_API mil_status mil_load_memory(mil_model *model, const void *bytes, size_t size, const mil_load_options *options);
#ifndef MIL_NO_STDIO
MIL_API mil_status mil_load(mil_model *model, const char *path);                                          // default options
MIL_API mil_status mil_load_with(mil_model *model, const char *path, const mil_load_options *options);
// Saves weights under the reference's keys, with the model's name, config and class names in the metadata. Atomic: after
// a crash the old file or the new one is there.
MIL_API mil_status mil_save(mil_model *model, const char *path);
// Creates the model that a file saved by mil_save describes and loads it; a file of others needs a `config.json` beside it.
MIL_API mil_model *mil_open(mil_context *ctx, const char *path);
#endif
MIL_API mil_model *mil_open_memory(mil_context *ctx, const void *bytes, size_t size);
// Writes what mil_save would into memory: *size is the room on entry, the need on return (dst NULL: only asks).
MIL_API mil_status mil_save_memory(mil_model *model, void *dst, size_t *size);

// ---- option tables -----------------------------------------------------------------------------------------------
// A model's hyperparameters, for listing (`mil models`) and for models of your own. The config is a plain struct; each
// row says where its member lies. Defaults are text, read by the same parser as the caller's options.
typedef enum mil_option_type {
    MIL_OPTION_INT,          // int64_t
    MIL_OPTION_REAL,         // double
    MIL_OPTION_BOOL,         // int, 0 or 1; "true" and "false" in text
    MIL_OPTION_CHOICE,       // int, position in `choices` ("relu|gelu|tanh")
    MIL_OPTION_TEXT,         // char[MIL_OPTION_TEXT_SIZE]
    MIL_OPTION_INTS,         // mil_int_list: "[1,2,3]" or "null"
    MIL_OPTION_TEXTS         // mil_text_list
} mil_option_type;

typedef struct mil_option {
    const char     *name;
    mil_option_type type;
    size_t          offset;
    const char     *value;                                // default, as text
    const char     *choices;                              // CHOICE: "a|b|c"; a number type: "min..max" or NULL
    const char     *doc;                                  // one line
} mil_option;

typedef struct mil_config { const char *name, *options; } mil_config;    // a named set of overrides: {"base_afs", "distill=AFS"}

// ==== >>bags: what a model is given, and what it answers ==========================================================

typedef struct mil_named_tensor { const char *name; mil_tensor tensor; } mil_named_tensor;

// One bag, or a batch of bags of equal (padded) length. Nothing is copied; the memory stays the caller's.
typedef struct mil_bag {
    mil_tensor features;                                  // [N, D] or [B, N, D], any dtype, rows may be strided
    mil_tensor coords;                                    // [N, 2] or [B, N, 2], patch positions; data NULL: none
    mil_tensor mask;                                      // [N] or [B, N], 0 = padding, any other number a real instance; data NULL: all are real
    const mil_named_tensor *extra;                        // whatever else a model asks for by name: "adj_index", ...
    int        extra_count;
} mil_bag;

MIL_API mil_bag mil_bag_make(const float *features, int64_t instances, int64_t dim);       // features [instances, dim], packed; other dtypes: mil_bag_from
MIL_API mil_bag mil_bag_from(const mil_tensor *features);                                  // of any dtype, [N, D] or [B, N, D]; NULL: no features

// X(constant, name, meaning)
#define MIL_LOSS_LIST(X)                                                                            \
    X(MIL_LOSS_CE,  "ce",  "softmax cross-entropy, mean over bags; label: class index")             \
    X(MIL_LOSS_BCE, "bce", "sigmoid cross-entropy, mean over logits; label: 0..1 per logit")

#define MILI_LOSS_ENUM(name, key, text) name,
typedef enum mil_loss { MIL_LOSS_LIST(MILI_LOSS_ENUM) MIL_LOSS_COUNT } mil_loss;
#undef MILI_LOSS_ENUM

// What a bag should give, and how a miss is counted. From mil_target_class or mil_target_value; then change members.
typedef struct mil_target {
    mil_loss       loss;
    int64_t        label;                                 // CE, one bag: the class
    const int64_t *labels;                                // CE, a batch: [B] classes; NULL: `label`
    double         value;                                 // BCE, one logit: the target in 0..1
    const double  *values;                                // BCE: [B * C]; NULL: `value`
    int64_t        count;                                 // how many labels or values
    double         weight;                                // multiplies the whole loss of this call, auxiliary losses too; above 0
    const double  *class_weights;                         // CE: [C], or NULL for all 1; the mean is weighted, as torch does
    double         label_smoothing;                       // CE: 0..1
    double         pos_weight;                            // BCE: weight of positives, 1 for none
} mil_target;
// The mean over bags is divided by the sum of the bags' class weights: with one bag per call they cancel, and `weight` is what
// weighs bags (weight = class_weights[label] for classes of different sizes). All bags of a call in classes of weight 0 are
// MIL_ERROR_ARGUMENT. A target that is zeroed memory is one too: its weight is 0.
MIL_API mil_target mil_target_class(int64_t label);                                        // CE, weight 1
MIL_API mil_target mil_target_value(double value);                                         // BCE, weight 1

#define MIL_MAX_OUTPUTS 32
typedef struct mil_outputs {
    mil_node *features;                                   // the input itself, [B, N, D]
    mil_node *logits;                                     // [B, C]
    mil_node *loss;                                       // one element, times target->weight; NULL without a target
    mil_node *attention;                                  // in the reference's shape, as it returns it; NULL when the model has none
    mil_node *attention_scores;                           // [B, N, K] raw scores, or NULL
    mil_node *attention_weights;                          // [B, N, K] after the softmax over instances, or NULL
    mil_node *contribution;                               // [B, N, C]: the summand of instance n in logit c, so that they add up to the
                                                          // logit but for a bias; NULL where the logits are no such sum
    mil_node *slide_feats;                                // what enters the classifier
    struct { const char *name; mil_node *node; } extra[MIL_MAX_OUTPUTS];   // auxiliary losses and others by name
    int       extra_count;
} mil_outputs;
// An output by name ("logits", "loss", "attention", "instance_loss", ...); NULL when absent.
MIL_API mil_node *mil_outputs_find(const mil_outputs *out, const char *name);

// Records a forward pass. target NULL: no losses. Nothing is kept: keep what you want to read. With training on
// (mil_tape_training), dropout is on. Errors as mil_tape_status; MIL_ERROR_ARGUMENT for a bag or label that does not fit.
MIL_API mil_status mil_model_record(mil_tape *tape, mil_model *model, const mil_bag *bag, const mil_target *target, mil_outputs *out);

// ==== >>scoring: whole bags and streams of patches ================================================================

// X(constant, name, shape and meaning for one bag of N instances). A batch of B bags gives B such blocks, one after the other.
// Masked instances have weight, contribution and rank 0, and are not counted in the others' ranks.
#define MIL_RESULT_LIST(X)                                                                          \
    X(MIL_LOGITS,        "logits",        "[C]")                                                    \
    X(MIL_PROBABILITIES, "probabilities", "[C] softmax of the logits; C = 1: sigmoid")              \
    X(MIL_ATTENTION,     "attention",     "[N, K] raw scores, or the weights of a model without; masked: the lowest finite number") \
    X(MIL_WEIGHTS,       "weights",       "[N, K] attention after the softmax")                    \
    X(MIL_RANK,          "rank",          "[N, K] place of its attention among the bag's, 0 the lowest, 1 the highest; ties share their mean") \
    X(MIL_CONTRIBUTION,  "contribution",  "[N, C] summand of each instance in each logit")          \
    X(MIL_SLIDE_FEATS,   "slide_feats",   "what enters the classifier")

#define MILI_RESULT_ENUM(name, key, text) name,
typedef enum mil_result { MIL_RESULT_LIST(MILI_RESULT_ENUM) MIL_RESULT_COUNT } mil_result;
#undef MILI_RESULT_ENUM
MIL_API const char *mil_result_name(mil_result result);

typedef struct mil_scorer mil_scorer;

typedef struct mil_scorer_options {
    int64_t  capacity;       // instances to reserve for; pushing more grows the memory (0: grow as needed)
    unsigned results;        // bits (1u << MIL_ATTENTION) ... of what will be read beside logits and probabilities
} mil_scorer_options;
MIL_API mil_scorer_options mil_scorer_options_default(void);                                // attention, no reserve

// A scorer keeps packed weights and workspace, so that scoring allocates nothing once it has seen the largest bag.
// Returns NULL on error, with a sentence in the context; model NULL gives NULL and keeps the sentence there, so that
// mil_scorer_create(mil_open(..), NULL) needs one check. options NULL: the defaults. The model must outlive the scorer.
// Weights may change between bags (training, mil_load): the next bag is scored with the new ones. In the middle of a pushed
// bag that is MIL_ERROR_STATE, until mil_scorer_reset. Who writes to mil_param.data must count mil_param.version up.
MIL_API mil_scorer *mil_scorer_create(mil_model *model, const mil_scorer_options *options);
MIL_API void mil_scorer_free(mil_scorer *scorer);                                           // NULL is fine
// The most that a scorer of this model takes from the allocator, block headers included, when a bag of `instances` without a
// mask is scored and options->capacity is that large. Without capacity a bag that comes in pieces makes the
// memory grow by doubling, with old and new held for a moment: up to 3 times as much. 0 on error. Needs memory for the
// recorded model while it looks. A fixed block (mil_context_options.memory) holds the context, 3 KB at most, the model (what
// mil_context_bytes shows after creating it, and 128 bytes for each of its parameters and 1 KB for block headers), and this.
MIL_API size_t mil_scorer_bytes(mil_model *model, const mil_scorer_options *options, int64_t instances);

// Scores a whole bag, or a batch of bags where the model takes one (any model). What was pushed before is forgotten, and a
// push after this call begins a new bag. Errors: as mil_model_record and mil_tape_run; MIL_ERROR_NUMERIC for NaN or infinity in the
// features (but for what a mask hides) or, where weights make numbers overflow, in the logits: no result can then be read.
MIL_API mil_status mil_scorer_score(mil_scorer *scorer, const mil_bag *bag);

// Adds instances to the bag that is being pushed; the first push after mil_scorer_score begins a new one.
//   rows    [count, in_dim] features of `dtype`, each row `stride` bytes after the one before (0: packed).
//           Only read during the call; may be unaligned. NaN or infinity in a row is an error.
//   count   instances, 0 or more; a bag may be pushed in any number of calls, with the same bits as in one.
// Returns MIL_OK, MIL_ERROR_ARGUMENT or MIL_ERROR_NUMERIC (the bag is unchanged), MIL_ERROR_UNSUPPORTED for a model that needs
// all instances at once (the sentence names the op), or MIL_ERROR_NO_MEMORY (only beyond `capacity`; the bag is unchanged).
// Memory grows with the bag by the results asked for, and by what the model reads again once it has seen all instances, such as
// an embedding that is weighed by a softmax before a non-linear head: up to 64 numbers per instance are kept, a wider value is
// MIL_ERROR_UNSUPPORTED.
// Threads: one call at a time per scorer. Source: streamed softmax pooling, Milakov and Gimelshein 2018, section 3.
MIL_API mil_status mil_scorer_push(mil_scorer *scorer, const void *rows, int64_t count, size_t stride, mil_dtype dtype);
MIL_API void mil_scorer_reset(mil_scorer *scorer);                                          // an empty bag
MIL_API int64_t mil_scorer_instances(const mil_scorer *scorer);                             // N so far; of each bag in a batch

// Results for the instances so far. mil_scorer_count: elements of a result now; 0 when there is no instance yet, when the
// model does not give the result, or when it was not asked for.
// mil_scorer_read: `count` must be mil_scorer_count. Errors: MIL_ERROR_STATE (no instance yet; not asked for in options.results;
// weights changed in the middle of the bag), MIL_ERROR_UNSUPPORTED (the model does not give it), MIL_ERROR_ARGUMENT (no such
// result, dst NULL, another count), MIL_ERROR_NUMERIC (logits of a pushed bag that are not finite). mil_scorer_read_f64 gives
// doubles, as the metrics take them; probabilities are then computed in double, so that they sum to 1.
MIL_API int64_t    mil_scorer_count(mil_scorer *scorer, mil_result result);
MIL_API mil_status mil_scorer_read(mil_scorer *scorer, mil_result result, mil_real *dst, int64_t count);
MIL_API mil_status mil_scorer_read_f64(mil_scorer *scorer, mil_result result, double *dst, int64_t count);

// Checks that this build computes on this machine what it should: the weights of a small abmil from their seed, its logits
// for a known bag against stored ones and against a plain loop in double, a stream against the whole bag (same bits), a file
// in memory written and read again (same bits). Logits agree to 2e-5, in a context of MIL_PRECISION_BF16 to 2e-2.
// Call it at start-up; it takes a few milliseconds and about 1 MB for the time.
// Errors: MIL_ERROR_NUMERIC (the sentence names the check), MIL_ERROR_NO_MEMORY, MIL_ERROR_UNKNOWN when abmil was left out.
MIL_API mil_status mil_selftest(mil_context *ctx);

#ifndef MIL_NO_TRAINING
// ==== >>training: losses, optimizers, one call per step ===========================================================

// The loss of logits against `target`, one element. CE: logits [B, C], as torch's CrossEntropyLoss. BCE: any shape, as torch's
// BCEWithLogitsLoss. Checks the target (a class outside 0..C-1, NaN, counts that do not fit) and copies it into the tape.
// target->weight is left to mil_model_record, which multiplies the model's whole loss by it.
MIL_API mil_node *mil_loss_node(mil_node *logits, const mil_target *target);
MIL_API mil_node *mil_cross_entropy(mil_node *logits, mil_node *labels, mil_node *class_weights, double label_smoothing);   // labels [B] MIL_I64, weights [C] or NULL
MIL_API mil_node *mil_bce_with_logits(mil_node *logits, mil_node *targets, double pos_weight);                  // same shapes

// What a trainer is told: X(TYPE, name, default, choices or range, meaning). `t` counts updates, see schedule_unit.
#define MIL_TRAINER_OPTION_LIST(X)                                                                                              \
    X(CHOICE, optimizer,       "adamw",    "sgd|adam|adamw|radam", "adam: weight decay in the gradient; adamw: beside it")      \
    X(REAL,   lr,              "0.0001",   "0..",  "learning rate, the schedule's start")                                       \
    X(REAL,   weight_decay,    "0.00001",  "0..",  "added to the gradient as weight_decay p; decoupled: p is cut by lr weight_decay p") \
    X(BOOL,   decoupled,       "false",    NULL,   "radam: weight decay as adamw's")                                            \
    X(BOOL,   decay_all,       "true",     NULL,   "false: no weight decay for tensors of one axis (biases, norms)")            \
    X(REAL,   momentum,        "0",        "0..1", "sgd")                                                                       \
    X(BOOL,   nesterov,        "false",    NULL,   "sgd: look ahead along the momentum")                                        \
    X(REAL,   beta1,           "0.9",      "0..1", "adam, adamw, radam: decay of the gradient's mean")                          \
    X(REAL,   beta2,           "0.999",    "0..1", "adam, adamw, radam: decay of its mean square")                              \
    X(REAL,   eps,             "0.00000001", "0..", "adam, adamw, radam: added to the root of the mean square; above 0")        \
    X(BOOL,   lookahead,       "false",    NULL,   "slow weights that follow the optimizer's (Zhang et al. 2019)")              \
    X(INT,    lookahead_k,     "6",        "1..",  "updates between two moves of the slow weights")                             \
    X(REAL,   lookahead_alpha, "0.5",      "0..1", "how far they move")                                                         \
    X(INT,    accumulate,      "1",        "1..",  "calls of mil_trainer_step per update")                                      \
    X(CHOICE, reduction,       "mean",     "mean|sum", "of the gradients of these calls")                                       \
    X(REAL,   clip_norm,       "0",        "0..",  "the gradient over all parameters is cut to this length; 0: not")            \
    X(REAL,   clip_value,      "0",        "0..",  "each element of it is cut to +-this, before clip_norm; 0: not")             \
    X(CHOICE, schedule,        "constant", "constant|step|cosine", "of the learning rate")                                      \
    X(INT,    schedule_unit,   "1",        "1..",  "updates per unit of t; updates per epoch: the rate changes between epochs") \
    X(INT,    steps,           "0",        "0..",  "cosine: the t at which min_lr is reached, the warm-up's t included")        \
    X(REAL,   min_lr,          "0",        "0..",  "cosine: min_lr + (lr - min_lr) (1 + cos(pi t / steps)) / 2, then min_lr")  \
    X(REAL,   gamma,           "0.1",      "0..",  "step: lr gamma^floor(t / every)")                                           \
    X(REAL,   every,           "1",        "0..",  "step: need not be whole")                                                   \
    X(INT,    warmup,          "0",        "0..",  "t < warmup: warmup_lr + t (lr - warmup_lr) / warmup")                       \
    X(REAL,   warmup_lr,       "0.000001", "0..",  "where the warm-up starts")                                                  \
    X(BOOL,   warmup_shift,    "true",     NULL,   "the schedule runs from the warm-up's end: t - warmup and steps - warmup in its formula; false: beneath it, from t = 0") \
    X(REAL,   ema,             "0",        "0..1", "decay of the averaged weights; 0: none are kept")                           \
    X(BOOL,   ema_warmup,      "false",    NULL,   "decay min(ema, 1 - (1 + q / ema_gamma)^-ema_power), q = max(0, updates before this one - ema_after - 1)") \
    X(INT,    ema_after,       "0",        "0..",  "updates before the average starts to lag; only with ema_warmup")            \
    X(REAL,   ema_gamma,       "1",        "0..",  "of ema_warmup")                                                             \
    X(REAL,   ema_power,       "0.6666666666666666", "0..", "of ema_warmup")                                                    \
    X(INT,    seed,            "0",        NULL,   "of dropout and other draws")

// The order of an epoch's bags: out [n] gets 0..n-1, shuffled as a function of seed and epoch alone, the same on any machine.
MIL_API void mil_shuffle(uint64_t seed, uint64_t epoch, int64_t n, int64_t *out);

typedef struct mil_trainer mil_trainer;

// An optimizer with schedule, clipping, accumulation and EMA, over a model's trainable parameters. One per model at a time;
// the model must outlive it. options: "key=value ..." of the list above; NULL or "" for none.
// Returns NULL on error (sentence in the context): an unknown option, values that do not fit each other, no memory.
MIL_API mil_trainer *mil_trainer_create(mil_model *model, const char *options);
MIL_API void mil_trainer_free(mil_trainer *trainer);                                        // NULL is fine
MIL_API const mil_option *mil_trainer_options(int *count);

// One bag or batch: forward, backward, and after `accumulate` of them an update. *loss (NULL: not wanted) gets the loss.
// logits (NULL: not wanted): room for B * C, the logits before the update.
// A parameter that no loss since the last update depends on is left alone, without decay or momentum; so is a frozen one.
// Errors: as mil_model_record; MIL_ERROR_NUMERIC when the loss is not finite. Weights, buffers, moments and accumulated
// gradients are then as before the call. MIL_ERROR_NUMERIC also when the gradient is not finite at an update: the gradients
// accumulated for it are dropped, weights and moments are as before. MIL_ERROR_STATE while the averaged weights are swapped in.
// Once it has seen the largest bag, a step allocates nothing.
MIL_API mil_status mil_trainer_step(mil_trainer *trainer, const mil_bag *bag, const mil_target *target, double *loss, mil_real *logits);
// The loss and the logits (NULL: not wanted) of one bag or batch as the model stands, dropout off; nothing is updated or counted.
// Also while the averaged weights are swapped in. Errors as mil_trainer_step. mil_trainer_tape is then that of this call.
MIL_API mil_status mil_trainer_evaluate(mil_trainer *trainer, const mil_bag *bag, const mil_target *target, double *loss, mil_real *logits);
// Updates with the gradients accumulated so far, as at the end of an epoch whose last group is not full; a mean is by
// their own number. Nothing when there are none.
MIL_API mil_status mil_trainer_flush(mil_trainer *trainer);
MIL_API int64_t mil_trainer_steps(const mil_trainer *trainer);                              // updates so far
MIL_API double  mil_trainer_lr(const mil_trainer *trainer);                                 // rate of the next update
MIL_API double  mil_trainer_grad_norm(const mil_trainer *trainer);                          // gradient's length at the last update, before clip_norm
MIL_API void    mil_trainer_scale_lr(mil_trainer *trainer, double factor);                  // multiplies the schedule from now on; nothing when negative or not finite
MIL_API void    mil_trainer_seed(mil_trainer *trainer, uint64_t seed);                      // of dropout and other draws
// The tape of the last step, for memory queries and options. To supply draws: mil_tape_reset, mil_tape_draw, then the step.
MIL_API mil_tape *mil_trainer_tape(mil_trainer *trainer);

// Swaps the averaged weights (EMA) into the model, and back. MIL_ERROR_STATE without `ema`, or before the first update.
MIL_API mil_status mil_trainer_swap_ema(mil_trainer *trainer);

// All that a later mil_trainer_restore needs to go on with the same bits: moments, counters, EMA, accumulated gradients, as
// safetensors. The model's weights are saved apart (mil_save; put both into one file, mil_save_memory's bytes and these as two U8
// tensors of mil_tensors_write, where a kill between two files must not part them). save: *size is the room on entry, the need on return (dst NULL:
// only asks). restore: into a trainer with the same options over a model of the same parameters; unchanged unless MIL_OK. An
// option of another value is MIL_ERROR_FORMAT and named, but for `seed`, which the state brings along as it does the factor of
// mil_trainer_scale_lr, by which the rate of a restored run can be changed.
MIL_API mil_status mil_trainer_save(const mil_trainer *trainer, void *dst, size_t *size);
MIL_API mil_status mil_trainer_restore(mil_trainer *trainer, const void *bytes, size_t size);
#endif

#ifndef MIL_NO_METRICS
// ==== >>metrics: how good predictions are, how well calibrated, and how sure that is ===============================
// Functions on plain arrays: n bags (or instances), C classes, labels in 0..C-1, scores and probabilities in double.
//   - An argument that makes no sense (a label outside 0..C-1, NaN, nothing to measure, a row of probabilities that does
//     not sum to 1) is MIL_ERROR_ARGUMENT with a sentence in the context; results are then left as they were.
//   - A value that the data leave undefined (AUROC of one class only, kappa of a constant rater) is NaN with MIL_OK.
//   - Sums run in a fixed order, sorting is stable: the same input gives the same bits.
//   - Binary data: labels 0 and 1, class 1 the positive one. Probabilities may come as [n, 2] or, C = 1, as the one column
//     of class 1.
// Threads: calls with different contexts are independent. Memory: what a call allocates it frees before it returns.

// What mil_metrics holds: X(NAME, member, sign, meaning); sign +1: higher is better, -1: lower is better. "Two classes only": NaN
// with more.
#define MIL_METRIC_LIST(X)                                                                                      \
    X(ACCURACY,          accuracy,          +1, "share of bags whose predicted class is the true one")          \
    X(BALANCED_ACCURACY, balanced_accuracy, +1, "recall, averaged over the classes that have bags")             \
    X(AUROC,             auroc,             +1, "area under the ROC curve, class 1; C > 2: mean of one-vs-rest") \
    X(AUROC_WEIGHTED,    auroc_weighted,    +1, "the same, one-vs-rest weighted by the classes' bags")          \
    X(AVERAGE_PRECISION, average_precision, +1, "step-wise area under precision-recall, class 1; C > 2: mean")  \
    X(F1_MACRO,          f1_macro,          +1, "F1, plain mean over classes")                                  \
    X(F1_WEIGHTED,       f1_weighted,       +1, "F1, mean weighted by the classes' bags")                       \
    X(PRECISION_MACRO,   precision_macro,   +1, "precision, plain mean over classes")                           \
    X(RECALL_MACRO,      recall_macro,      +1, "recall, plain mean over classes seen or predicted")            \
    X(SPECIFICITY_MACRO, specificity_macro, +1, "specificity, plain mean over classes")                         \
    X(F1,                f1,                +1, "F1 of class 1; two classes only")                              \
    X(PRECISION,         precision,         +1, "positive predictive value of class 1; two classes only")       \
    X(SENSITIVITY,       sensitivity,       +1, "recall of class 1; two classes only")                          \
    X(SPECIFICITY,       specificity,       +1, "recall of class 0; two classes only")                          \
    X(KAPPA,             kappa,             +1, "Cohen's kappa, unweighted")                                    \
    X(KAPPA_LINEAR,      kappa_linear,      +1, "Cohen's kappa, weights |i - j| (ordered classes)")             \
    X(KAPPA_QUADRATIC,   kappa_quadratic,   +1, "Cohen's kappa, weights (i - j)^2 (ordered classes)")           \
    X(BRIER,             brier,             -1, "mean squared error of the probabilities")                      \
    X(ECE,               ece,               -1, "expected calibration error of the top class, 15 bins")         \
    X(LOG_LOSS,          log_loss,          -1, "mean negative log-likelihood, nats")

typedef enum mil_metric {
#define MIL_X(NAME, member, sign, meaning) MIL_METRIC_##NAME,
    MIL_METRIC_LIST(MIL_X)
#undef MIL_X
    MIL_METRIC_COUNT
} mil_metric;

typedef struct mil_metrics {
    int64_t count;                                        // n
    int64_t class_count;                                  // C, 2 when one column was given
    int64_t absent_count;                                 // classes without a bag: balanced accuracy, AUROC and average precision leave
                                                          // them out, the other averages those that are not predicted either
#define MIL_X(NAME, member, sign, meaning) double member;
    MIL_METRIC_LIST(MIL_X)
#undef MIL_X
} mil_metrics;

// Name ("auroc"), meaning, +1 or -1, and the value in m of one metric; NULL, 0 or NaN for one that does not exist.
// mil_metric_find gives MIL_METRIC_COUNT for a name that does not exist.
MIL_API const char *mil_metric_name(mil_metric which);
MIL_API const char *mil_metric_meaning(mil_metric which);
MIL_API int mil_metric_sign(mil_metric which);
MIL_API double mil_metric_value(const mil_metrics *m, mil_metric which);
MIL_API mil_metric mil_metric_find(const char *name);

// Everything at once.
//   probabilities  [n, C], rows that sum to 1 (within 1%), or [n] of class 1 with C = 1
//   labels         [n]
// The prediction is the most probable class, the lower one on ties. Equal to the single functions below.
// Errors: MIL_ERROR_ARGUMENT, MIL_ERROR_NO_MEMORY. Time O(C n log n), memory about 8 C n bytes.
MIL_API mil_status mil_metrics_compute(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                       int64_t C, mil_metrics *out);

// ---- from predicted classes: the confusion matrix and what follows from it -------------------------
// predicted [n]: the column with the highest of scores [n, C], the lower one on ties; C = 1: 1 where the score exceeds 0.5.
MIL_API mil_status mil_metric_predict(mil_context *ctx, const double *scores, int64_t n, int64_t C, int64_t *predicted);

// confusion [C, C]: confusion[t * C + p] bags of class t were predicted as p. predicted [n], labels [n].
MIL_API mil_status mil_metric_confusion(mil_context *ctx, const int64_t *predicted, const int64_t *labels, int64_t n,
                                        int64_t C, int64_t *confusion);

// From confusion [C, C] with at least one bag in it. Balanced accuracy: mean recall of the classes that have bags.
MIL_API mil_status mil_metric_accuracy(mil_context *ctx, const int64_t *confusion, int64_t C, double *value);
MIL_API mil_status mil_metric_balanced_accuracy(mil_context *ctx, const int64_t *confusion, int64_t C, double *value);

// How one value is made of one per class. Macro: plain mean. Weighted: by the class's number of bags.
typedef enum mil_average { MIL_AVERAGE_MACRO, MIL_AVERAGE_WEIGHTED } mil_average;

// With tp, fp, fn, tn of class c against the rest:
//   precision tp / (tp + fp)    recall tp / (tp + fn)    specificity tn / (tn + fp)    F1 2 tp / (2 tp + fp + fn)
// A quotient with denominator 0 is 0. The mean leaves out classes with tp + fp + fn = 0 (neither seen nor predicted), as
// torchmetrics and scikit-learn do: such a class's value is NaN. per_class [C], NULL when not wanted, receives each class's value.
MIL_API mil_status mil_metric_precision(mil_context *ctx, const int64_t *confusion, int64_t C, mil_average average,
                                        double *per_class, double *value);
MIL_API mil_status mil_metric_recall(mil_context *ctx, const int64_t *confusion, int64_t C, mil_average average,
                                     double *per_class, double *value);
MIL_API mil_status mil_metric_specificity(mil_context *ctx, const int64_t *confusion, int64_t C, mil_average average,
                                          double *per_class, double *value);
MIL_API mil_status mil_metric_f1(mil_context *ctx, const int64_t *confusion, int64_t C, mil_average average,
                                 double *per_class, double *value);

// Cohen's kappa 1 - sum_ij w_ij M_ij / sum_ij w_ij E_ij, E_ij = row_i col_j / n, with w_ij = [i != j], |i - j| or (i - j)^2.
// NaN when chance alone gives full agreement. Source: Cohen 1960, 1968.
typedef enum mil_kappa_weights { MIL_KAPPA_UNWEIGHTED, MIL_KAPPA_LINEAR, MIL_KAPPA_QUADRATIC } mil_kappa_weights;
MIL_API mil_status mil_metric_kappa(mil_context *ctx, const int64_t *confusion, int64_t C, mil_kappa_weights weights,
                                    double *value);

// ---- from scores: ranking --------------------------------------------------------------------------
// scores [n], any that order (infinite ones too); labels [n], 0 or 1.
// AUROC: share of (positive, negative) pairs in the right order, equal scores counting one half (midranks).
// Average precision: sum_k (R_k - R_{k-1}) P_k over the distinct scores from the highest down, without interpolation.
// NaN when there are no positives, for AUROC also when there are no negatives.
MIL_API mil_status mil_metric_auroc(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n, double *value);
MIL_API mil_status mil_metric_average_precision(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n,
                                                double *value);

// The same, each class of scores [n, C] against the rest; C >= 2. per_class [C], NULL when not wanted, has NaN for a class
// whose value is undefined (no bags, or all of them); the mean leaves these out, and is NaN when none is left.
MIL_API mil_status mil_metric_auroc_ovr(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n, int64_t C,
                                        mil_average average, double *per_class, double *value);
MIL_API mil_status mil_metric_average_precision_ovr(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n,
                                                    int64_t C, mil_average average, double *per_class, double *value);

// Youden's threshold: `score >= *threshold` as positive maximises J = sensitivity + specificity - 1. Of equal maxima the
// highest threshold; infinity when no threshold beats J = 0. Both NaN when a class is absent. j may be NULL.
MIL_API mil_status mil_metric_youden(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n,
                                     double *threshold, double *j);

// ---- from probabilities: calibration ---------------------------------------------------------------
// probabilities [n, C] or, C = 1, [n] of class 1; labels [n]. As in mil_metrics_compute.
// Brier: mean over bags of sum_c (p_c - [y = c])^2, halved for two classes, so that it is (p_1 - y)^2.
// Log loss: mean of -log p_y, p_y not below 2.2e-16.
// ECE: bags by the probability of their predicted class in `bins` equal intervals (lo, hi] of [0, 1];
//      sum_b n_b/n |accuracy_b - mean probability_b|. Source: Guo et al. 2017, section 2.
MIL_API mil_status mil_metric_brier(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                    int64_t C, double *value);
MIL_API mil_status mil_metric_log_loss(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                       int64_t C, double *value);
MIL_API mil_status mil_metric_ece(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                  int64_t C, int64_t bins, double *value);

// Temperature scaling: the T in [0.01, 100] for which softmax(logits / T) (C = 1: the sigmoid) has the lowest mean negative
// log-likelihood, and that value in *nll (may be NULL). Fit it on validation bags, use it on test bags.
//   logits [n, C], finite; labels [n]
// The likelihood is convex in 1/T: Newton steps inside a shrinking bracket, always ending at the optimum. When none lies
// inside (every bag right: T wants to be 0; worse than chance: infinite) T is the end that is nearest to it; 1 when no T
// changes anything. Source: Guo et al. 2017, section 4.2.
MIL_API mil_status mil_temperature_fit(mil_context *ctx, const double *logits, const int64_t *labels, int64_t n, int64_t C,
                                       double *temperature, double *nll);

// ---- survival --------------------------------------------------------------------------------------
// Harrell's C-index. A pair (i, j), i with an event, counts when t_j > t_i, or t_j = t_i and j is censored; it is concordant
// when risk_j < risk_i, tied when |risk_j - risk_i| <= tolerance. value = (concordant + tied_risk / 2) / all pairs, NaN when
// no pair counts (all censored, for one).
//   risk [n], times [n], finite; events [n], 1 event, 0 censored. tolerance >= 0, 1e-8 as in scikit-survival.
// Time O(n log n). Source: Harrell, Lee, Mark 1996.
typedef struct mil_cindex {
    double value;
    int64_t concordant, discordant, tied_risk;            // pairs
    int64_t tied_time;                                    // of these, pairs of equal time
} mil_cindex;
MIL_API mil_status mil_metric_cindex(mil_context *ctx, const double *risk, const double *times, const int64_t *events,
                                     int64_t n, double tolerance, mil_cindex *out);

// ---- bootstrap: percentile confidence intervals ----------------------------------------------------
// When a resample is drawn class by class, each class keeping its number of bags.
typedef enum mil_stratify {
    MIL_STRATIFY_NEEDED,                                  // only where the plain draw has lost a class of the data
    MIL_STRATIFY_ALWAYS,
    MIL_STRATIFY_NEVER
} mil_stratify;

typedef struct mil_bootstrap_options {
    int64_t resamples;                                    // 1000; at least 2
    double confidence;                                    // 0.95, between 0 and 1
    uint64_t seed;                                        // 0; every draw is a function of seed, resample and position
    mil_stratify stratify;                                // MIL_STRATIFY_NEEDED
    const int64_t *indices;                               // NULL, or [resamples, n]: the caller's draws, used as they are
} mil_bootstrap_options;
MIL_API mil_bootstrap_options mil_bootstrap_default(void);

typedef struct mil_interval {
    double value;                                         // on the data as they are
    double mean, std;                                     // over the resamples, divisor resamples - 1
    double low, high;                                     // percentiles (1 -+ confidence)/2, linear between neighbours
    int64_t resamples;                                    // resamples whose value was a number; the others are left out
    int64_t stratified;                                   // resamples drawn class by class
} mil_interval;

// A metric of the bags indices[0..n-1] (repeats among them), into *value; NaN: undefined for this draw. Anything but MIL_OK
// ends the bootstrap with that status.
typedef mil_status (*mil_metric_function)(mil_context *ctx, void *user, const int64_t *indices, int64_t n, double *value);

// The interval of any metric. labels [n] in 0..C-1, or NULL when there are no classes to keep. options NULL: the defaults.
MIL_API mil_status mil_bootstrap(mil_context *ctx, mil_metric_function metric, void *user, const int64_t *labels, int64_t n,
                                 int64_t C, const mil_bootstrap_options *options, mil_interval *out);

// The intervals of everything in mil_metrics, on the same resamples: out [MIL_METRIC_COUNT], by mil_metric. Scores are
// sorted once, so that a resample takes O(C n).
MIL_API mil_status mil_metrics_bootstrap(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                         int64_t C, const mil_bootstrap_options *options, mil_interval *out);

// The interval of the C-index; strata are the bags with and without an event.
MIL_API mil_status mil_cindex_bootstrap(mil_context *ctx, const double *risk, const double *times, const int64_t *events,
                                        int64_t n, double tolerance, const mil_bootstrap_options *options, mil_interval *out);
#endif // MIL_NO_METRICS

// ==== >>files: safetensors, NPY, crash-safe writing ===============================================================
//
// Readers check every rule of a format before they hand out a byte, and refuse with one sentence in mil_error that names
// the file, the tensor, the value and the rule. Nothing is allocated that the file's own size does not justify; a reader
// that fails leaves *out NULL. Writers replace a file atomically: after a crash the old file or the new one is there.
//
// A tensor's data points into the file's bytes: it may be unaligned, is only to be read, and lives as long as its handle.
// Values are not checked: a NaN is a legal weight, and a BOOL byte other than 0 is true.
//
// Paths are UTF-8. With MIL_NO_STDIO the functions that take a path are gone, those on memory stay.
// Threads: a handle may be read by several threads at once; opening, writing and freeing use the context, so one at a time.

// Flags for opening, or-ed together.
typedef enum mil_file_flag {
    MIL_FILE_MAP       = 0,   // map the file where the system can, else read it
    MIL_FILE_READ      = 1,   // read it into memory. A mapped file that another process shortens raises SIGBUS when it is
                              // touched, and one that is overwritten changes under the reader; a read one does neither
    MIL_FILE_LIST_ONLY = 2    // safetensors: tensors of dtypes not offered here are listed (data NULL) instead of refused
} mil_file_flag;

#ifndef MIL_NO_STDIO
// ---- files as bytes ----

// A whole file in memory, mapped or read.
//   limit   the most bytes accepted, 0: any. A larger file is refused before it is read.
//   flags   MIL_FILE_MAP or MIL_FILE_READ
// Errors: MIL_ERROR_IO (missing, a folder, a pipe, unreadable, shrinks while it is read), MIL_ERROR_FORMAT (over the limit),
// MIL_ERROR_NO_MEMORY. The size is taken once, when the file is opened.
typedef struct mil_file mil_file;
MIL_API mil_status  mil_file_open(mil_context *ctx, const char *path, size_t limit, unsigned flags, mil_file **out);
MIL_API const void *mil_file_data(const mil_file *file);       // NULL for an empty file; no 0 is put after the last byte
MIL_API size_t      mil_file_size(const mil_file *file);
MIL_API void        mil_file_free(mil_file *file);             // NULL is fine

// Replaces the file at `path` by `size` bytes of data, or leaves it as it was.
MIL_API mil_status mil_file_write(mil_context *ctx, const char *path, const void *data, size_t size);

// The same piece by piece. Bytes go to a new file beside the target; mil_writer_commit flushes it to the disk, renames it
// over the target and flushes the folder. Freed without a commit, or after any failure, the new file is removed and the
// target is as before. A target that exists must be a regular file or a symbolic link to one, which is replaced, not followed.
// Errors: MIL_ERROR_IO (no space, no permission, ...), MIL_ERROR_NO_MEMORY; later calls repeat the first one's code.
// If only the last step fails, flushing the folder, the new file is there but may not survive a power cut.
typedef struct mil_writer mil_writer;
MIL_API mil_status mil_writer_create(mil_context *ctx, const char *path, mil_writer **out);
MIL_API mil_status mil_writer_put(mil_writer *writer, const void *data, size_t size);
MIL_API mil_status mil_writer_commit(mil_writer *writer);      // once; then only mil_writer_free
MIL_API void       mil_writer_free(mil_writer *writer);        // NULL is fine
#endif

// ---- safetensors ----

// An open safetensors file. Tensors are numbered 0..count-1 in the order of the header.
typedef struct mil_tensors mil_tensors;

// Opens a file, or `size` bytes of memory that must stay as they are until mil_tensors_free.
//   flags   mil_file_flag
// On a big-endian machine the data are copied and swapped, else they stay where they are.
// Errors: as mil_file_open; MIL_ERROR_FORMAT (a rule is broken); MIL_ERROR_UNSUPPORTED (a dtype that is not offered here, a
// rank above MIL_MAX_RANK); MIL_ERROR_ARGUMENT.
#ifndef MIL_NO_STDIO
MIL_API mil_status mil_tensors_open(mil_context *ctx, const char *path, unsigned flags, mil_tensors **out);
#endif
MIL_API mil_status mil_tensors_open_memory(mil_context *ctx, const void *bytes, size_t size, unsigned flags, mil_tensors **out);
MIL_API void       mil_tensors_free(mil_tensors *file);        // NULL is fine

// What it holds. NULL (or -1) for an index or name that does not exist. Texts are UTF-8 and live as long as the handle.
MIL_API int64_t           mil_tensors_count(const mil_tensors *file);
MIL_API const char       *mil_tensors_name(const mil_tensors *file, int64_t index);
MIL_API const mil_tensor *mil_tensors_at(const mil_tensors *file, int64_t index);
MIL_API size_t            mil_tensors_bytes(const mil_tensors *file, int64_t index);     // bytes of data of one tensor
MIL_API const char       *mil_tensors_dtype(const mil_tensors *file, int64_t index);     // as the file says it, "F8_E4M3" too
MIL_API int64_t           mil_tensors_find(const mil_tensors *file, const char *name);   // index, by binary search
MIL_API const mil_tensor *mil_tensors_get(const mil_tensors *file, const char *name);

// Metadata: text by key, in the order of the header.
MIL_API int64_t     mil_tensors_meta_count(const mil_tensors *file);
MIL_API const char *mil_tensors_meta_key(const mil_tensors *file, int64_t index);
MIL_API const char *mil_tensors_meta_value(const mil_tensors *file, int64_t index);
MIL_API const char *mil_tensors_meta(const mil_tensors *file, const char *key);

// Writes `count` tensors. The same tensors and texts give the same bytes, whatever their order here: tensors are sorted as
// the reference writer does (larger elements first, then by name), metadata by key. Strided tensors are written packed.
//   names      [count] UTF-8, unique, not "__metadata__"
//   meta       [meta_count] pairs with unique keys; "format" = "pt", which some readers want, is added unless it is given
// The path version replaces the file atomically (see mil_writer_create). The memory version: *size is the room on entry, the
// need on return; dst NULL only asks; too little room is MIL_ERROR_ARGUMENT and nothing is written.
typedef struct mil_meta { const char *key, *value; } mil_meta;
#ifndef MIL_NO_STDIO
MIL_API mil_status mil_tensors_write(mil_context *ctx, const char *path, const mil_tensor *tensors, const char *const *names,
                                     int64_t count, const mil_meta *meta, int64_t meta_count);
#endif
MIL_API mil_status mil_tensors_write_memory(mil_context *ctx, const mil_tensor *tensors, const char *const *names, int64_t count,
                                            const mil_meta *meta, int64_t meta_count, void *dst, size_t *size);

// ---- NPY ----

// One array of an NPY file, versions 1.0, 2.0, 3.0. Fortran order is given as strides; big-endian data (on a big-endian
// machine: little-endian data) are copied and swapped. bfloat16, text, dates, complex, structured and object arrays are
// refused with a hint (MIL_ERROR_UNSUPPORTED). Opening as for safetensors.
typedef struct mil_npy mil_npy;
#ifndef MIL_NO_STDIO
MIL_API mil_status mil_npy_open(mil_context *ctx, const char *path, unsigned flags, mil_npy **out);
#endif
MIL_API mil_status mil_npy_open_memory(mil_context *ctx, const void *bytes, size_t size, unsigned flags, mil_npy **out);
MIL_API void       mil_npy_free(mil_npy *npy);                 // NULL is fine

MIL_API const mil_tensor *mil_npy_tensor(const mil_npy *npy);
MIL_API const char       *mil_npy_warning(const mil_npy *npy); // bytes after the array; "" when there are none

// Writes version 1.0, little-endian, C order, data at a multiple of 64: the bytes that NumPy writes. MIL_BF16 is
// MIL_ERROR_UNSUPPORTED. Path and memory versions as for safetensors.
#ifndef MIL_NO_STDIO
MIL_API mil_status mil_npy_write(mil_context *ctx, const char *path, const mil_tensor *t);
#endif
MIL_API mil_status mil_npy_write_memory(mil_context *ctx, const mil_tensor *t, void *dst, size_t *size);
// ==== >>extending: your own ops, models and backends ==============================================================

// ---- ops ---------------------------------------------------------------------------------------------------------
// An op is a table of functions (mil_op), a node of it is recorded from a spec. In short, an op with a gradient:
//
// [example: an op]
//     // snake(x) = x + sin(a x)^2 / a, element by element (Ziyin et al. 2020), and its gradient dy (1 + sin(2 a x)), an op, too.
//     static void snake_run(const mil_exec *x)
//     {
//         const mil_real *in = (const mil_real *)x->in[0];       // first row of the block, as it is with x->out
//         mil_real *out = (mil_real *)x->out;
//         const double a = x->node->r[0];
//         for (int64_t i = 0; i < x->rows * x->node->cols; i++) {
//             const double s = sin(a * (double)in[i]);
//             out[i] = (mil_real)((double)in[i] + s * s / a);
//         }
//     }
//
//     static void snake_grad_run(const mil_exec *x)
//     {
//         const mil_real *in = (const mil_real *)x->in[0], *dy = (const mil_real *)x->in[1];
//         for (int64_t i = 0; i < x->rows * x->node->cols; i++)
//             ((mil_real *)x->out)[i] = (mil_real)((double)dy[i] * (1 + sin(2 * x->node->r[0] * (double)in[i])));
//     }
//
//     static mil_node *snake_record(const mil_op *op, mil_node *x, mil_node *dy, double a)
//     {
//         if (!x) return NULL;                                   // an earlier op failed; the tape knows
//         mil_spec s = mil_spec_make(op, MIL_KIND_ROWS, x->rank, x->shape);
//         s.input_count = dy ? 2 : 1;
//         s.input[0] = x;
//         s.input[1] = dy;
//         s.row_inputs = dy ? 3 : 1;                             // every input is cut into rows like the result
//         s.r[0] = a;
//         return mil_record(x->tape, &s);
//     }
//
//     static const mil_op snake_grad_op = MIL_OP_ROWS("gradient of snake", snake_grad_run, NULL);
//     static void snake_grad(mil_node *n, mil_node *dy)
//     {
//         mil_add_grad(n->input[0], snake_record(&snake_grad_op, n->input[0], dy, n->r[0]));
//     }
//     static const mil_op snake_op = MIL_OP_ROWS("snake", snake_run, snake_grad);
//     static mil_node *snake(mil_node *x, double a) { return snake_record(&snake_op, x, NULL, a); }
// [end]
//
// Inputs come as mil_real (MIL_I64 as int64_t), packed, whatever was given: those of other dtypes are converted before.
// A ROWS kernel is called for blocks of rows, how many and how large is the planner's choice. A REDUCE op keeps a state of
// its own (state_bytes) for each of up to 16 partitions: begin for each; step for each block, with x->state, x->in at the block's
// first row and x->row its number; merge in the order of the rows; finish once, which writes x->out from the first
// partition's x->state. Which rows a partition gets depends on their number only, never on the threads.

// What a kernel of an op works on. Kernels are called for a block of rows; a kernel never knows which thread it is on.
typedef struct mil_exec {
    mil_context *ctx;
    const mil_node *node;
    const void *const *in;       // per input: for a row input the first row of this block, else the whole value
    void       *out;             // first row of this block (rows kinds), the whole value (whole kinds), or the result (finish)
    int64_t     row, rows;       // this block is rows [row, row + rows) of all_rows
    int64_t     all_rows;        // of the bag so far, in a stream
    void       *state;           // reductions: of this partition
    void       *second;          // the op's second result (mil_node_second), if it has one
    void       *prepared;        // what op->prepare wrote
    void       *scratch;         // op->scratch(node) bytes, aligned to 64, not shared with other blocks
    const void *kernels;         // private, as is what follows
    const void *area;
} mil_exec;

// How a node is computed, and with that how the planner may cut it.
typedef enum mil_kind {
    MIL_KIND_LEAF,               // inputs, parameters, constants
    MIL_KIND_VIEW,               // another shape over the first input's memory
    MIL_KIND_ROWS,               // row i of the result needs only row i of its row inputs; other inputs are whole
    MIL_KIND_REDUCE,             // reads rows, keeps a state of fixed size; partitions are merged in a fixed order
    MIL_KIND_WHOLE               // needs all of its inputs
} mil_kind;

#define MIL_MAX_INPUTS 8
#define MIL_MAX_ATTRS 8

struct mil_op {
    const char *name;
    void (*run)(const mil_exec *x);                                // ROWS: a block of rows; WHOLE: everything
    // REDUCE: begin a state; add rows to it; merge a later partition's state into an earlier one's; write the result.
    size_t (*state_bytes)(const mil_node *n);
    void (*begin)(const mil_exec *x);
    void (*step)(const mil_exec *x);
    void (*merge)(const mil_exec *x, void *into, const void *from);
    void (*finish)(const mil_exec *x);
    size_t (*scratch)(const mil_node *n);                          // bytes of scratch per block, NULL: none
    size_t (*prepare_bytes)(const mil_node *n);                    // ROWS: something made once before the blocks (packed weights); NULL or 0: nothing
    void (*prepare)(const mil_exec *x);                            // writes it to x->prepared
    void (*grad)(mil_node *n, mil_node *dy);                       // records gradients through mil_add_grad; NULL: not differentiable
    unsigned flags;                                                // MIL_OP_*
};
// The rows of such a table for most ops; a static const mil_op = MIL_OP_ROWS("snake", snake_run, snake_grad);
#define MIL_OP_ROWS(name, run, grad) { name, run, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, grad, 0 }
#define MIL_OP_WHOLE(name, run, grad) MIL_OP_ROWS(name, run, grad)
#define MIL_OP_REDUCE(name, state_bytes, begin, step, merge, finish, grad) \
    { name, NULL, state_bytes, begin, step, merge, finish, NULL, NULL, NULL, grad, 0 }
enum {
    MIL_OP_STOPS_GRADIENT = 1,                                     // what stands below gets no gradient through it, on purpose
    MIL_OP_WHOLE_INPUTS = 4,                                       // ROWS, REDUCE: inputs may all be whole (row_inputs 0), on purpose
    MIL_OP_WAVES = 2                                               // REDUCE: run adds rows to x->out itself (starts it when x->row is 0), parallel
};                                                                 // inside; used instead of many states where a state is large

struct mil_node {                                                  // read-only for users
    const mil_op *op;
    mil_tape   *tape;
    mil_kind    kind;
    mil_dtype   dtype;
    int         rank;
    int64_t     shape[MIL_MAX_RANK];
    int64_t     count;                                             // elements
    int64_t     rows, cols;                                        // of the value: all axes but the last, the last
    int64_t     outer;                                             // REDUCE: independent reductions; else 1
    int64_t     in_rows;                                           // REDUCE: rows of its row inputs, per `outer`; else as rows
    int         input_count;
    mil_node   *input[MIL_MAX_INPUTS];
    unsigned    row_inputs;                                        // bit i: input i is cut into rows like the result
    int64_t     i[MIL_MAX_ATTRS];                                  // the op's own numbers
    double      r[MIL_MAX_ATTRS];
    const void *p;                                                 // the op's own pointer (param, names)
    const char *layer;                                             // where it was recorded
    void       *data;                                              // value's memory while the tape runs; NULL while only blocks exist
    mil_node   *second;                                            // a second result of the same kernel, or NULL
    mil_node   *grad;
    struct mili_plan_node *plan;                                   // private from here on
    int64_t     index;
    unsigned    flags;
};

// Records a node of an op, yours or the library's. Start from mil_spec_make, which sets op, kind, dtype MIL_REAL_DTYPE, rank and
// shape of the result, and zeros; set inputs, row_inputs (ROWS and REDUCE: bit i when input i is cut into rows; 0 is refused unless
// the op has MIL_OP_WHOLE_INPUTS), outer and in_rows (REDUCE), and the op's own numbers.
typedef struct mil_spec {
    const mil_op *op;
    mil_kind   kind;
    mil_dtype  dtype;
    int        rank;
    int64_t    shape[MIL_MAX_RANK];
    int64_t    outer, in_rows;                                     // REDUCE only: [outer, in_rows, ..] of the row inputs
    int        input_count;
    mil_node  *input[MIL_MAX_INPUTS];
    unsigned   row_inputs;
    int64_t    i[MIL_MAX_ATTRS];
    double     r[MIL_MAX_ATTRS];
    const void *p;
} mil_spec;
MIL_API mil_spec  mil_spec_make(const mil_op *op, mil_kind kind, int rank, const int64_t *shape);
MIL_API mil_node *mil_record(mil_tape *tape, const mil_spec *spec);                          // NULL after an error
// A second result written by the same kernel through x->second.
MIL_API mil_node *mil_node_second(mil_node *n, mil_dtype dtype, int rank, const int64_t *shape);
#ifndef MIL_NO_TRAINING
MIL_API void mil_add_grad(mil_node *x, mil_node *dx);                                        // in op->grad: adds to x's gradient; same shape
#endif
MIL_API int  mil_wants_grad(const mil_node *x);                                              // whether mil_add_grad would be used
// The library's own ops, for those who write backends.
MIL_API int64_t       mil_op_count(void);
MIL_API const mil_op *mil_op_at(int64_t i);                                                  // NULL outside 0..count-1
MIL_API const mil_op *mil_op_find(const char *name);                                         // NULL when there is none
// Records an error and returns NULL: `return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "snake: rank %d", x->rank)`.
MIL_API mil_node *mil_tape_fail(mil_tape *tape, mil_status status, const char *format, ...) MIL_PRINTF(3, 4);
// In the run of a WHOLE kind: task(arg, i, scratch) for i in 0..count-1 on the context's threads, each with op->scratch(node)
// bytes of its own. Split by fixed sizes, never by the thread count, so that results do not depend on it.
MIL_API void mil_exec_parallel(const mil_exec *x, int64_t count, void (*task)(void *arg, int64_t index, void *scratch), void *arg);

// ---- models ------------------------------------------------------------------------------------------------------
// What a model's forward pass is given.
typedef struct mil_inputs {
    mil_tape *tape;
    mil_node *features;                                            // [B, N, in_dim]
    mil_node *mask;                                                // [B, N] of 0 and 1, or NULL
    mil_node *coords;                                              // [B, N, 2] or NULL
    const mil_bag *bag;
    const mil_target *target;                                      // NULL: no losses
    mil_context *ctx;
} mil_inputs;
MIL_API mil_node *mil_inputs_find(const mil_inputs *in, const char *name);                   // one of bag->extra, or NULL
MIL_API void mil_output(mil_outputs *out, const char *name, mil_node *node);                 // an auxiliary output; `name` is kept as a pointer

// A model of one's own (a longer one: examples/own_model.c):
//
// [example: a model]
//     // Mean pooling: h = snake(W x + b), z = mean_n h_n, logits = C z + c.
//     typedef struct { int64_t in_dim, num_classes, width; } my_config;
//     typedef struct { mil_linear_layer embed, classifier; } my_layers;
//
//     static const mil_option my_options[] = {
//         { "in_dim",      MIL_OPTION_INT, offsetof(my_config, in_dim),      "1024", "1..1000000", "width of an instance" },
//         { "num_classes", MIL_OPTION_INT, offsetof(my_config, num_classes), "2",    "1..1000000", "classes" },
//         { "width",       MIL_OPTION_INT, offsetof(my_config, width),       "64",   "1..1000000", "width of the hidden layer" }
//     };
//     static const mil_config my_configs[] = { { "base", "" }, { "wide", "width=256" } };
//
//     static void my_declare(mil_builder *b, void *layers, const void *config)
//     {
//         my_layers *m = (my_layers *)layers;
//         const my_config *c = (const my_config *)config;
//         m->embed = mil_declare_linear(b, c->in_dim, c->width, 1, MIL_LINEAR_TORCH, "embed");           // embed.weight, embed.bias
//         m->classifier = mil_declare_linear(b, c->width, c->num_classes, 1, MIL_LINEAR_TORCH, "classifier");
//     }
//
//     static void my_forward(const void *layers, const void *config, const mil_inputs *in, mil_outputs *out)
//     {
//         const my_layers *m = (const my_layers *)layers;
//         (void)config;
//         mil_node *h = snake(mil_linear_forward(&m->embed, in->features), 1);                           // [B, N, width]
//         out->slide_feats = mil_squeeze(mil_mean(h, 1), 1);                                             // [B, width]
//         out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                            // [B, C]
//     #ifndef MIL_NO_TRAINING
//         if (in->target) out->loss = mil_loss_node(out->logits, in->target);
//     #endif
//     }
//
//     static const mil_architecture my_model = {
//         "mymean", "mean pooling over snake features", "this comment", "model.", my_options, 3, sizeof(my_config), my_configs, 2,
//         sizeof(my_layers), "classifier", MIL_MODEL_BATCHES, my_declare, my_forward
//     };
//     // then: mil_register(ctx, &my_model); model = mil_create(ctx, "mymean.wide", "in_dim=512 num_classes=3");
// [end]
//
// Option rows named in_dim and num_classes are what mil_model_in_dim and mil_model_num_classes tell; the encoder in a name
// fills the first. There is at least one config. forward sets what the model has in *out, the rest stays NULL; out->loss is what is
// trained, so an auxiliary loss is added to it there (mil_output only gives it a name to read it by).
typedef struct mil_architecture {
    const char *name;                                              // "abmil"
    const char *title;                                             // one line
    const char *citation;
    const char *prefix;                                            // of the state-dict keys: "model."
    const mil_option *options; int option_count;
    size_t      config_size;                                       // of the struct that the options fill
    const mil_config *configs; int config_count;                   // "base", ...
    size_t      model_size;                                        // of the struct of layers
    const char *head;                                              // key prefixes of the classification head, separated by blanks: "classifier"
                                                                   // "heads?": under new_head those that file and model both have are loaded
    unsigned    flags;                                             // MIL_MODEL_*
    // Declares the parameters: fills *model (zeroed, model_size bytes) from *config.
    void (*declare)(mil_builder *b, void *model, const void *config);
    // Records the forward pass.
    void (*forward)(const void *model, const void *config, const mil_inputs *in, mil_outputs *out);
} mil_architecture;
enum { MIL_MODEL_BATCHES = 1, MIL_MODEL_MASK = 2, MIL_MODEL_COORDS = 4 };                    // takes batches, a mask, needs coordinates

MIL_API int64_t mil_architecture_count(void);                                                // those that come with the library
MIL_API const mil_architecture *mil_architecture_at(int64_t i);
MIL_API const mil_architecture *mil_model_architecture(const mil_model *model);
// Makes a model of your own known to mil_create, mil_open of this context. The struct is not copied.
// Errors: MIL_ERROR_ARGUMENT (something is missing: name, configs, declare, forward, the option in_dim; or a model of this
// name has a config of the same name already, the library's own among them).
MIL_API mil_status mil_register(mil_context *ctx, const mil_architecture *architecture);

// ---- backends ----------------------------------------------------------------------------------------------------
// A backend runs nodes. The library plans memory and order; the backend owns memory and kernels. Ops that it does not support
// run on the CPU kernels with copies, which are counted (mil_context_fallbacks). open and close may be NULL, and with host_memory
// upload and download; the rest is needed.
struct mil_backend {
    const char *name;
    mil_status (*open)(void **self, mil_context *ctx);             // once per context
    void       (*close)(void *self, mil_context *ctx);
    void      *(*allocate)(void *self, mil_context *ctx, size_t bytes);                      // NULL: no memory
    void       (*release)(void *self, mil_context *ctx, void *memory, size_t bytes);
    mil_status (*upload)(void *self, void *dst, const void *src, size_t bytes);              // from the host
    mil_status (*download)(void *self, void *dst, const void *src, size_t bytes);            // to the host
    int        (*supports)(void *self, const mil_node *node);
    mil_status (*run)(void *self, mil_context *ctx, mil_node *const *nodes, int64_t count);  // in this order; node->data and inputs' data are backend memory
    mil_status (*synchronize)(void *self);
    int        host_memory;                                        // 1: its memory is the host's, no copies are needed
};
MIL_API int64_t mil_context_fallbacks(const mil_context *ctx);                               // nodes that ran on the CPU instead
// Runs one node with the library's plain CPU kernels on host memory (node->data, inputs' data). For backends' fallbacks and tests.
MIL_API void mil_cpu_run(mil_context *ctx, mil_node *node);

#endif // MIL_H

// ==================================================================================================================
#if (defined(MIL_IMPLEMENTATION) || defined(MIL_STATIC)) && !defined(MIL_IMPLEMENTED)
#define MIL_IMPLEMENTED

// ==== >>platform: memory, threads, text ===========================================================================

#if (defined(__unix__) || defined(__APPLE__)) && !defined(_WIN32)
#define MILI_POSIX 1
#else
#define MILI_POSIX 0
#endif
#if defined(_WIN32)
#define MILI_WINDOWS 1
#else
#define MILI_WINDOWS 0
#endif

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#if defined(MIL_MALLOC) && defined(MIL_REALLOC) && defined(MIL_FREE)
#elif !defined(MIL_MALLOC) && !defined(MIL_REALLOC) && !defined(MIL_FREE)
#include <stdlib.h>
#define MIL_MALLOC(size) malloc(size)
#define MIL_REALLOC(block, size) realloc(block, size)
#define MIL_FREE(block) free(block)
#else
#error "mil.h: define all of MIL_MALLOC, MIL_REALLOC, MIL_FREE, or none"
#endif

#ifndef MIL_ASSERT
#define MIL_ASSERT(x) ((void)sizeof((x) ? 1 : 0))          // not evaluated, but its variables count as used
#endif

// The pool needs atomics as well as threads; a compiler without either runs single-threaded.
#if !defined(MIL_NO_THREADS) && (defined(__GNUC__) || defined(__clang__)) && MILI_POSIX
#define MILI_THREADS 1
#include <pthread.h>
#include <unistd.h>
#elif !defined(MIL_NO_THREADS) && MILI_WINDOWS
#define MILI_THREADS 1
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#define MILI_THREADS 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define MILI_FN static __attribute__((unused))
#define MILI_INLINE static inline __attribute__((unused))
#define MILI_RESTRICT __restrict__
#elif defined(_MSC_VER)
#define MILI_FN static
#define MILI_INLINE static __inline
#define MILI_RESTRICT __restrict
#else
#define MILI_FN static
#define MILI_INLINE static
#define MILI_RESTRICT
#endif

// Definitions of public functions: C linkage comes from the declaration, so only MIL_STATIC needs a word here.
#ifdef MIL_STATIC
#define MIL_DEF static
#elif defined(__cplusplus)
#define MIL_DEF extern "C"
#else
#define MIL_DEF
#endif

#define MILI_MIN(a, b) ((a) < (b) ? (a) : (b))
#define MILI_MAX(a, b) ((a) > (b) ? (a) : (b))
#define MILI_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define MILI_UNUSED(x) ((void)(x))

#if MIL_REAL_IS_FLOAT
#define MILI_REAL_MAX FLT_MAX
#define mili_exp expf
#define mili_log logf
#define mili_log1p log1pf
#define mili_sqrt sqrtf
#define mili_tanh tanhf
#define mili_erf erff
#define mili_erfc erfcf
#define mili_fabs fabsf
#define mili_pow powf
#define mili_sin sinf
#define mili_cos cosf
#define mili_floor floorf
#else
#define MILI_REAL_MAX DBL_MAX
#define mili_exp exp
#define mili_log log
#define mili_log1p log1p
#define mili_sqrt sqrt
#define mili_tanh tanh
#define mili_erf erf
#define mili_erfc erfc
#define mili_fabs fabs
#define mili_pow pow
#define mili_sin sin
#define mili_cos cos
#define mili_floor floor
#endif

// Infinity and NaN are made and tested as bits, so that -ffast-math cannot fold the tests away.
MILI_INLINE mil_real mili_from_bits(uint64_t bits64, uint32_t bits32)
{
    mil_real x;
#if MIL_REAL_IS_FLOAT
    memcpy(&x, &bits32, sizeof x);
    MILI_UNUSED(bits64);
#else
    memcpy(&x, &bits64, sizeof x);
    MILI_UNUSED(bits32);
#endif
    return x;
}
#define MILI_INF mili_from_bits(0x7ff0000000000000u, 0x7f800000u)
#define MILI_NAN mili_from_bits(0x7ff8000000000000u, 0x7fc00000u)

MILI_INLINE int mili_is_finite_f64(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return (u & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

MILI_INLINE int mili_is_nan_f64(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return (u & 0x7fffffffffffffffu) > 0x7ff0000000000000u;
}

MILI_INLINE int mili_is_finite(mil_real x)
{
#if MIL_REAL_IS_FLOAT
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (u & 0x7f800000u) != 0x7f800000u;
#else
    return mili_is_finite_f64(x);
#endif
}


// ---- overflow-checked sizes ----
MILI_INLINE int mili_mul_size(size_t a, size_t b, size_t *out)
{
    *out = a * b;
    return a == 0 || *out / a == b;
}

MILI_INLINE int mili_add_size(size_t a, size_t b, size_t *out)
{
    *out = a + b;
    return *out >= a;
}

// Elements of a shape; -1 when an axis is negative or the product (zeros aside) does not fit.
MILI_FN int64_t mili_shape_count(int rank, const int64_t *shape)
{
    int64_t count = 1, zero = 0;
    for (int a = 0; a < rank; a++) {
        if (shape[a] < 0) return -1;
        if (shape[a] == 0) { zero = 1; continue; }
        if (count > INT64_MAX / 16 / shape[a]) return -1;
        count *= shape[a];
    }
    if ((uint64_t)count > (uint64_t)SIZE_MAX / 16) return -1;
    return zero ? 0 : count;
}

// ---- the context ----
struct mili_kernels;
typedef struct mili_pool mili_pool;
typedef struct mili_block_heap mili_block_heap;
#define MILI_ERROR_SIZE 1024
#define MILI_MAX_SLOTS 64                                  // blocks in flight at once, so also the most threads

struct mil_context {
    mil_allocator  allocator;
    size_t         bytes, peak;
    int64_t        blocks;                                 // that the bytes are in
    mil_status     status;
    char           error[MILI_ERROR_SIZE];
    const struct mili_kernels *kernels;
    int            threads;
    mil_precision  precision;                              // in use
    mil_parallel   parallel;
    mili_pool     *pool;
    const mil_backend *backend;
    void          *backend_self;
    int64_t        fallbacks;
    const mil_architecture **registered;                   // models of the caller's own
    int64_t        registered_count;
};

MILI_FN mil_status mili_fail_list(mil_context *ctx, mil_status status, const char *format, va_list args)
{
    if (ctx->status == MIL_OK) {
        ctx->status = status;
        vsnprintf(ctx->error, sizeof ctx->error, format, args);
    }
    return status;
}

MIL_PRINTF(3, 4) MILI_FN mil_status mili_fail(mil_context *ctx, mil_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    mili_fail_list(ctx, status, format, args);
    va_end(args);
    return status;
}

// Every public call that can fail starts with this, so that mil_error speaks of the last call.
MILI_INLINE void mili_enter(mil_context *ctx)
{
    ctx->status = MIL_OK;
    ctx->error[0] = 0;
}

// The same for a context that may be NULL: 0 then.
MILI_INLINE int mili_begin(mil_context *ctx)
{
    if (ctx) mili_enter(ctx);
    return ctx != NULL;
}

MIL_DEF const char *mil_version(void) { return MIL_VERSION; }
MIL_DEF const char *mil_error(const mil_context *ctx) { return ctx ? ctx->error : "no context"; }
MIL_DEF mil_status mil_error_status(const mil_context *ctx) { return ctx ? ctx->status : MIL_ERROR_ARGUMENT; }
MIL_DEF void mil_error_clear(mil_context *ctx) { if (ctx) mili_enter(ctx); }
MIL_DEF size_t mil_context_bytes(const mil_context *ctx) { return ctx ? ctx->bytes : 0; }
MIL_DEF size_t mil_context_peak_bytes(const mil_context *ctx) { return ctx ? ctx->peak : 0; }
MIL_DEF int mil_context_threads(const mil_context *ctx) { return ctx ? ctx->threads : 0; }
MIL_DEF mil_precision mil_context_precision(const mil_context *ctx) { return ctx ? ctx->precision : MIL_PRECISION_FULL; }
MIL_DEF int64_t mil_context_fallbacks(const mil_context *ctx) { return ctx ? ctx->fallbacks : 0; }

MIL_DEF const char *mil_status_name(mil_status status)
{
#define MILI_STATUS_NAME(name, text) #name,
    static const char *const names[] = { MIL_STATUS_LIST(MILI_STATUS_NAME) };
#undef MILI_STATUS_NAME
    return (unsigned)status < (unsigned)MILI_COUNT(names) ? names[status] : "?";
}

MIL_DEF const char *mil_status_text(mil_status status)
{
#define MILI_STATUS_TEXT(name, text) text,
    static const char *const texts[] = { MIL_STATUS_LIST(MILI_STATUS_TEXT) };
#undef MILI_STATUS_TEXT
    return (unsigned)status < (unsigned)MILI_COUNT(texts) ? texts[status] : "?";
}

MIL_DEF size_t mil_dtype_size(mil_dtype dtype)
{
#define MILI_DTYPE_SIZE(name, bytes, text) bytes,
    static const unsigned char sizes[] = { MIL_DTYPE_LIST(MILI_DTYPE_SIZE) };
#undef MILI_DTYPE_SIZE
    return (unsigned)dtype < (unsigned)MILI_COUNT(sizes) ? sizes[dtype] : 0;
}

MIL_DEF const char *mil_dtype_name(mil_dtype dtype)
{
#define MILI_DTYPE_NAME(name, bytes, text) text,
    static const char *const names[] = { MIL_DTYPE_LIST(MILI_DTYPE_NAME) };
#undef MILI_DTYPE_NAME
    return (unsigned)dtype < (unsigned)MILI_COUNT(names) ? names[dtype] : "?";
}

MIL_DEF mil_tensor mil_tensor_make(const void *data, mil_dtype dtype, int rank, const int64_t *shape)
{
    mil_tensor t;
    memset(&t, 0, sizeof t);
    memcpy(&t.data, &data, sizeof data);                   // the view's member is not const; inputs are only read
    t.dtype = dtype;
    t.rank = rank;
    for (int a = 0; a < rank && a < MIL_MAX_RANK; a++) t.shape[a] = shape[a];
    return t;
}

MIL_DEF mil_tensor mil_tensor_matrix(const void *data, mil_dtype dtype, int64_t rows, int64_t cols)
{
    int64_t shape[2];
    shape[0] = rows;
    shape[1] = cols;
    return mil_tensor_make(data, dtype, 2, shape);
}

MIL_DEF int64_t mil_tensor_count(const mil_tensor *t)
{
    if (!t || t->rank < 0 || t->rank > MIL_MAX_RANK || mil_dtype_size(t->dtype) == 0) return -1;
    return mili_shape_count(t->rank, t->shape);
}

// ---- allocation ----
// Blocks handed out are aligned to 64 (a cache line and the widest vector); the distance to what the allocator gave
// stands in the byte before. Sizes are passed back on free, so no header keeps them.

MILI_FN void *mili_default_reallocate(void *user, void *block, size_t old_size, size_t new_size)
{
    MILI_UNUSED(user);
    MILI_UNUSED(old_size);
    if (new_size == 0) { MIL_FREE(block); return NULL; }
    return block ? MIL_REALLOC(block, new_size) : MIL_MALLOC(new_size);
}

// A heap inside the caller's fixed block: a list of free pieces by address, first fit, neighbours merged on free.
typedef struct mili_free_piece { size_t size; struct mili_free_piece *next; } mili_free_piece;
struct mili_block_heap { mili_free_piece *free; };
#define MILI_PIECE 64

MILI_FN void *mili_block_reallocate(void *user, void *block, size_t old_size, size_t new_size)
{
    mili_block_heap *heap = (mili_block_heap *)user;
    MIL_ASSERT(block == NULL || new_size == 0);
    if (new_size == 0) {
        if (!block) return NULL;
        mili_free_piece *piece = (mili_free_piece *)block, *prev = NULL, *next = heap->free;
        piece->size = (old_size + MILI_PIECE - 1) / MILI_PIECE * MILI_PIECE;
        while (next && next < piece) { prev = next; next = next->next; }
        piece->next = next;
        if (next && (char *)piece + piece->size == (char *)next) { piece->size += next->size; piece->next = next->next; }
        if (!prev) heap->free = piece;
        else if ((char *)prev + prev->size == (char *)piece) { prev->size += piece->size; prev->next = piece->next; }
        else prev->next = piece;
        return NULL;
    }
    if (new_size > SIZE_MAX - MILI_PIECE) return NULL;
    const size_t size = (new_size + MILI_PIECE - 1) / MILI_PIECE * MILI_PIECE;
    for (mili_free_piece **at = &heap->free; *at; at = &(*at)->next) {
        mili_free_piece *piece = *at;
        if (piece->size < size) continue;
        if (piece->size == size) *at = piece->next;
        else {
            mili_free_piece *rest = (mili_free_piece *)(void *)((char *)piece + size);
            rest->size = piece->size - size;
            rest->next = piece->next;
            *at = rest;
        }
        return piece;
    }
    return NULL;
}

#define MILI_ALIGN 64

MILI_FN void *mili_allocate_with(const mil_allocator *allocator, size_t bytes)
{
    size_t total;
    if (!mili_add_size(bytes, MILI_ALIGN, &total)) return NULL;
    char *raw = (char *)allocator->reallocate(allocator->user, NULL, 0, total);
    if (!raw) return NULL;
    const size_t gap = MILI_ALIGN - (size_t)((uintptr_t)raw % MILI_ALIGN);       // 1..64
    raw[gap - 1] = (char)gap;
    return raw + gap;
}

MILI_FN void mili_release_with(const mil_allocator *allocator, void *p, size_t bytes)
{
    char *at = (char *)p;
    allocator->reallocate(allocator->user, at - (unsigned char)at[-1], bytes + MILI_ALIGN, 0);
}

MILI_FN void *mili_alloc(mil_context *ctx, size_t bytes)
{
    if (bytes == 0) return NULL;
    void *p = mili_allocate_with(&ctx->allocator, bytes);
    if (!p) {
        mili_fail(ctx, MIL_ERROR_NO_MEMORY, "no memory for %llu bytes", (unsigned long long)bytes);
        return NULL;
    }
    ctx->bytes += bytes;
    ctx->blocks++;
    if (ctx->bytes > ctx->peak) ctx->peak = ctx->bytes;
    return p;
}

MILI_FN void mili_free(mil_context *ctx, void *p, size_t bytes)
{
    if (!p) return;
    ctx->bytes -= bytes;
    ctx->blocks--;
    mili_release_with(&ctx->allocator, p, bytes);
}

MILI_FN void *mili_alloc_zero(mil_context *ctx, size_t bytes)
{
    void *p = mili_alloc(ctx, bytes);
    if (p) memset(p, 0, bytes);
    return p;
}

// On failure p is as before.
MILI_FN void *mili_realloc(mil_context *ctx, void *p, size_t old_bytes, size_t new_bytes)
{
    void *q = mili_alloc(ctx, new_bytes);
    if (!q) return NULL;
    if (p) memcpy(q, p, MILI_MIN(old_bytes, new_bytes));
    mili_free(ctx, p, old_bytes);
    return q;
}

// A growing array of `size`-byte elements: room for `need`. 0 after an allocation failure, the array is then as before.
MILI_FN int mili_reserve(mil_context *ctx, void **array, int64_t *capacity, int64_t need, size_t size)
{
    if (need <= *capacity) return 1;
    int64_t wanted = MILI_MAX(need, *capacity * 2);
    wanted = MILI_MAX(wanted, 16);
    size_t bytes;
    if (!mili_mul_size((size_t)wanted, size, &bytes)) {
        mili_fail(ctx, MIL_ERROR_NO_MEMORY, "no memory for %lld elements", (long long)wanted);
        return 0;
    }
    void *grown = mili_realloc(ctx, *array, (size_t)*capacity * size, bytes);
    if (!grown) return 0;
    *array = grown;
    *capacity = wanted;
    return 1;
}

// Memory that is given back all at once: chunks of growing size, kept over a reset.
typedef struct mili_chunk { struct mili_chunk *next; size_t size, used; } mili_chunk;
typedef struct mili_arena { mili_chunk *first, *current; } mili_arena;
#define MILI_CHUNK_HEAD 64
#ifndef MILI_FIRST_CHUNK
#define MILI_FIRST_CHUNK 16384                             // bytes. With 0 each piece is a chunk, so that tests can make each piece fail
#endif

MILI_FN void *mili_arena_alloc(mil_context *ctx, mili_arena *arena, size_t bytes)
{
    bytes = (bytes + 15) / 16 * 16;
    for (mili_chunk *c = arena->current; c; c = c->next) {
        arena->current = c;
        if (c->size - c->used >= bytes) {
            void *p = (char *)c + MILI_CHUNK_HEAD + c->used;
            c->used += bytes;
            return memset(p, 0, bytes);
        }
    }
    const size_t size = MILI_FIRST_CHUNK ? MILI_MAX(bytes, arena->current ? arena->current->size * 2 : MILI_FIRST_CHUNK) : bytes;
    mili_chunk *c = (mili_chunk *)mili_alloc(ctx, MILI_CHUNK_HEAD + size);
    if (!c) return NULL;
    c->next = NULL;
    c->size = size;
    c->used = bytes;
    if (arena->current) arena->current->next = c; else arena->first = c;
    arena->current = c;
    return memset((char *)c + MILI_CHUNK_HEAD, 0, bytes);
}

// Scratch: what is taken after a mark is given back by the release, while what was there before stays.
typedef struct mili_arena_mark { mili_chunk *chunk; size_t used; } mili_arena_mark;

MILI_FN mili_arena_mark mili_arena_here(const mili_arena *arena)
{
    mili_arena_mark mark;
    mark.chunk = arena->current;
    mark.used = arena->current ? arena->current->used : 0;
    return mark;
}

MILI_FN void mili_arena_release(mili_arena *arena, mili_arena_mark mark)
{
    for (mili_chunk *c = mark.chunk ? mark.chunk->next : arena->first; c; c = c->next) c->used = 0;
    if (mark.chunk) mark.chunk->used = mark.used;
    arena->current = mark.chunk ? mark.chunk : arena->first;
}

MILI_FN void mili_arena_reset(mili_arena *arena)
{
    for (mili_chunk *c = arena->first; c; c = c->next) c->used = 0;
    arena->current = arena->first;
}

MILI_FN void mili_arena_free(mil_context *ctx, mili_arena *arena)
{
    for (mili_chunk *c = arena->first, *next; c; c = next) {
        next = c->next;
        mili_free(ctx, c, MILI_CHUNK_HEAD + c->size);
    }
    arena->first = arena->current = NULL;
}

MILI_FN char *mili_arena_text(mil_context *ctx, mili_arena *arena, const char *text)
{
    const size_t n = strlen(text) + 1;
    char *copy = (char *)mili_arena_alloc(ctx, arena, n);
    if (copy) memcpy(copy, text, n);
    return copy;
}

// ---- threads ----
// A pool runs one job at a time: task(arg, i) for i in 0..count-1, indices taken from a shared counter. The caller works too.

#if MILI_THREADS
#if MILI_WINDOWS
typedef CRITICAL_SECTION mili_mutex;
typedef CONDITION_VARIABLE mili_cond;
typedef HANDLE mili_thread;
#define MILI_LOCK(m) EnterCriticalSection(m)
#define MILI_UNLOCK(m) LeaveCriticalSection(m)
#define MILI_WAIT(c, m) SleepConditionVariableCS(c, m, INFINITE)
#define MILI_WAKE_ALL(c) WakeAllConditionVariable(c)
#define MILI_THREAD_FN(name) static DWORD WINAPI name(LPVOID argument)
#define MILI_THREAD_RETURN return 0
#else
typedef pthread_mutex_t mili_mutex;
typedef pthread_cond_t mili_cond;
typedef pthread_t mili_thread;
#define MILI_LOCK(m) pthread_mutex_lock(m)
#define MILI_UNLOCK(m) pthread_mutex_unlock(m)
#define MILI_WAIT(c, m) pthread_cond_wait(c, m)
#define MILI_WAKE_ALL(c) pthread_cond_broadcast(c)
#define MILI_THREAD_FN(name) static void *name(void *argument)
#define MILI_THREAD_RETURN return NULL
#endif

// Jobs come in quick succession, and a thread that sleeps takes some 50 us to wake: who waits looks for as long before it sleeps.
// What is looked at without the mutex is read and written whole.
#if defined(__GNUC__) || defined(__clang__)
#define MILI_SPINS 2000
#define MILI_LOOK(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define MILI_SHOW(x, v) __atomic_store_n(&(x), v, __ATOMIC_RELAXED)
#if defined(__x86_64__) || defined(__i386__)
#define MILI_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define MILI_PAUSE() __asm__ volatile("yield")
#else
#define MILI_PAUSE() ((void)0)
#endif
#else
#define MILI_SPINS 0
#define MILI_LOOK(x) (x)
#define MILI_SHOW(x, v) ((x) = (v))
#define MILI_PAUSE() ((void)0)
#endif

struct mili_pool {
    mili_mutex mutex;
    mili_cond  wake, idle;
    int        workers, stop;
    unsigned   job;                                        // counts jobs, so that a worker sees a new one; no 64 bits, whose atomics some CPUs lack
    int        busy;                                       // workers inside the job
    int64_t    next, count;                                // guarded by the mutex: tasks are large, so a lock per task is cheap
    void     (*task)(void *arg, int64_t index);
    void      *arg;
    mili_thread thread[MILI_MAX_SLOTS];
};

// Takes and runs tasks until none is left. Called and left with the mutex held.
MILI_FN void mili_pool_work(mili_pool *pool)
{
    while (pool->next < pool->count) {
        const int64_t index = pool->next++;
        MILI_UNLOCK(&pool->mutex);
        pool->task(pool->arg, index);
        MILI_LOCK(&pool->mutex);
    }
}

MILI_THREAD_FN(mili_pool_main)
{
    mili_pool *pool = (mili_pool *)argument;
    unsigned seen = 0;
    MILI_LOCK(&pool->mutex);
    for (;;) {
        MILI_UNLOCK(&pool->mutex);
        for (int i = 0; i < MILI_SPINS && MILI_LOOK(pool->job) == seen && !MILI_LOOK(pool->stop); i++) MILI_PAUSE();
        MILI_LOCK(&pool->mutex);
        while (!pool->stop && pool->job == seen) MILI_WAIT(&pool->wake, &pool->mutex);
        if (pool->stop) break;
        seen = pool->job;
        MILI_SHOW(pool->busy, pool->busy + 1);
        mili_pool_work(pool);
        MILI_SHOW(pool->busy, pool->busy - 1);
        if (pool->busy == 0) MILI_WAKE_ALL(&pool->idle);
    }
    MILI_UNLOCK(&pool->mutex);
    MILI_THREAD_RETURN;
}

MILI_FN void mili_pool_run(mili_pool *pool, int64_t count, void (*task)(void *arg, int64_t index), void *arg)
{
    MILI_LOCK(&pool->mutex);
    pool->next = 0;
    pool->count = count;
    pool->task = task;
    pool->arg = arg;
    MILI_SHOW(pool->job, pool->job + 1);
    MILI_WAKE_ALL(&pool->wake);
    mili_pool_work(pool);
    if (pool->busy) {
        MILI_UNLOCK(&pool->mutex);
        for (int i = 0; i < MILI_SPINS && MILI_LOOK(pool->busy); i++) MILI_PAUSE();
        MILI_LOCK(&pool->mutex);
    }
    while (pool->busy) MILI_WAIT(&pool->idle, &pool->mutex);
    MILI_UNLOCK(&pool->mutex);
}

MILI_FN void mili_pool_free(mil_context *ctx, mili_pool *pool)
{
    if (!pool) return;
    MILI_LOCK(&pool->mutex);
    MILI_SHOW(pool->stop, 1);
    MILI_WAKE_ALL(&pool->wake);
    MILI_UNLOCK(&pool->mutex);
    for (int i = 0; i < pool->workers; i++) {
#if MILI_WINDOWS
        WaitForSingleObject(pool->thread[i], INFINITE);
        CloseHandle(pool->thread[i]);
#else
        pthread_join(pool->thread[i], NULL);
#endif
    }
#if MILI_WINDOWS
    DeleteCriticalSection(&pool->mutex);
#else
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->idle);
#endif
    mili_free(ctx, pool, sizeof *pool);
}

// NULL when no memory; fewer workers than asked for when the system gives no more threads.
MILI_FN mili_pool *mili_pool_create(mil_context *ctx, int workers)
{
    mili_pool *pool = (mili_pool *)mili_alloc_zero(ctx, sizeof *pool);
    if (!pool) return NULL;
#if MILI_WINDOWS
    InitializeCriticalSection(&pool->mutex);
    InitializeConditionVariable(&pool->wake);
    InitializeConditionVariable(&pool->idle);
#else
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
#endif
    for (int i = 0; i < workers; i++) {
#if MILI_WINDOWS
        pool->thread[i] = CreateThread(NULL, 0, mili_pool_main, pool, 0, NULL);
        if (!pool->thread[i]) break;
#else
        if (pthread_create(&pool->thread[i], NULL, mili_pool_main, pool) != 0) break;
#endif
        pool->workers = i + 1;
    }
    return pool;
}

MILI_FN int mili_cpu_count(void)
{
#if MILI_WINDOWS
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int)info.dwNumberOfProcessors;
#else
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)MILI_MIN(n, 1024) : 1;
#endif
}
#endif // MILI_THREADS

MILI_FN void mili_parallel(mil_context *ctx, int64_t count, void (*task)(void *arg, int64_t index), void *arg)
{
    if (count > 1 && ctx->parallel.run) { ctx->parallel.run(ctx->parallel.user, count, task, arg); return; }
#if MILI_THREADS
    if (count > 1 && ctx->pool) { mili_pool_run(ctx->pool, count, task, arg); return; }
#endif
    for (int64_t i = 0; i < count; i++) task(arg, i);
}

// A set of `count` slots (scratch blocks). Tasks take a free one and give it back; which one does not change results.
typedef struct mili_slots { volatile long taken[MILI_MAX_SLOTS]; int count; } mili_slots;

MILI_FN int mili_slot_take(mili_slots *slots)
{
    for (;;) {
        for (int i = 0; i < slots->count; i++) {
#if defined(__GNUC__) || defined(__clang__)
            if (!__atomic_exchange_n(&slots->taken[i], 1, __ATOMIC_ACQUIRE)) return i;
#elif MILI_WINDOWS
            if (!InterlockedExchange(&slots->taken[i], 1)) return i;
#else
            if (!slots->taken[i]) { slots->taken[i] = 1; return i; }
#endif
        }
    }
}

MILI_FN void mili_slot_give(mili_slots *slots, int slot)
{
#if defined(__GNUC__) || defined(__clang__)
    __atomic_store_n(&slots->taken[slot], 0, __ATOMIC_RELEASE);
#elif MILI_WINDOWS
    InterlockedExchange(&slots->taken[slot], 0);
#else
    slots->taken[slot] = 0;
#endif
}

// ---- text ----
// Edit distance for "did you mean", on short names only.
MILI_FN int mili_distance(const char *a, const char *b)
{
    int row[65];
    const int n = (int)MILI_MIN(strlen(b), 64);
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 0; a[i] && i < 64; i++) {
        int diagonal = row[0];
        row[0] = i + 1;
        for (int j = 0; j < n; j++) {
            const int up = row[j + 1], cost = diagonal + (a[i] != b[j]);
            diagonal = up;
            row[j + 1] = MILI_MIN(MILI_MIN(up, row[j]) + 1, cost);
        }
    }
    return row[n];
}

MILI_FN uint64_t mili_hash_text(const char *text)          // FNV-1a
{
    uint64_t h = 0xcbf29ce484222325u;
    for (; *text; text++) h = (h ^ (unsigned char)*text) * 0x100000001b3u;
    return h;
}

// Counter-based random bits: a mix of seed, stream and counter, so that any element can be drawn alone, in any order.
// Mixing steps: splitmix64 (Steele, Lea, Flood 2014), applied twice.
MILI_INLINE uint64_t mili_mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

MILI_INLINE uint64_t mili_random_bits(uint64_t seed, uint64_t stream, uint64_t counter)
{
    return mili_mix(mili_mix(seed + 0x9e3779b97f4a7c15u * (stream + 1)) + 0x9e3779b97f4a7c15u * (counter + 1));
}

MILI_INLINE double mili_random_unit(uint64_t seed, uint64_t stream, uint64_t counter)        // in [0, 1)
{
    return (double)(int64_t)(mili_random_bits(seed, stream, counter) >> 11) * (1.0 / 9007199254740992.0);
}

MILI_INLINE double mili_random_gauss(uint64_t seed, uint64_t stream, uint64_t counter)       // Box and Muller
{
    const double u = ((double)(mili_random_bits(seed, stream, 2 * counter) >> 11) + 0.5) * (1.0 / 9007199254740992.0);
    const double v = mili_random_unit(seed, stream, 2 * counter + 1);
    return sqrt(-2 * log(u)) * cos(6.283185307179586476925 * v);
}
// ==== >>kernels: GEMM, vector maths, reductions, conversions =====================================================
//
// Single-threaded functions on plain memory, written once per CPU tier and reached through a const table that the
// context picks at run time. Threads split rows (or panels); splitting never changes a result, because
//   - an element of C depends on its row of A, its column of B, n and k: not on m, not on where its row stands in the
//     call, not on whether B was packed beforehand;
//   - y[i] = f(x[i]) depends on x[i] only: the last few elements go through the same vector arithmetic as the others;
//   - sums have a fixed order that depends on n only, never on an address.
// Nothing is read or written outside the arrays given; nothing needs alignment (64 bytes are a little faster). The last
// bits may differ from one tier to another. (Under gcc's -ffast-math the plain tier does not keep the same bits.)
//
//   const mili_kernels *mili_kernels_choose(mil_cpu wanted)           NULL: this CPU or this build lacks that tier
//
//   int64_t mili_gemm_panels(K, n)                                    units in which packing B can be split
//   int64_t mili_gemm_packed_count(K, n, k)                           reals of a packed B [k, n]
//   void    mili_gemm_pack(K, dst, b, b_row, b_col, n, k)
//   void    mili_gemm_pack_panels(K, dst, b, b_row, b_col, n, k, first, end)      panels [first, end) of the same dst
//   void    mili_gemm_run(K, &gemm)
//
//   K->exp, tanh, sigmoid, erf, gelu, gelu_grad, silu, silu_grad, relu (y, x, n)          y[i] = f(x[i]); y may be x
//   K->gate(y, a, b, n)                                               y = tanh(a) * sigmoid(b); y may be a or b
//   K->add, sub, mul, div (y, a, b, n)                                y = a op b; y may be a or b
//   K->mul_add(y, a, b, n)                                            y += a b, element by element; y may not be a or b
//   K->tanh_grad, sigmoid_grad, relu_grad (y, v, d, n)                y = d f'(x) with v = f(x); y may be v or d
//   K->drop(y, x, u, rate, n)                                         y = u < rate ? 0 : x / (1 - rate); y may be x or u
//   K->axpy(y, a, x, n)                                               y += a x
//   K->scale(y, x, a, b, n)                                           y = a x + b; y may be x
//   K->sum(x, n), dot(x, y, n), max(x, n), min(x, n)                  n = 0: 0, 0, -inf, +inf. A NaN gives NaN.
//   K->finite(x, n)                                                   1 when every x is
//   K->exp_sum(y, x, n, shift)                                        y = exp(x - shift), returns sum(y); y may be x
//   mili_softmax_row(K, y, x, n)                                      all -inf gives zeros; y may be x
//
//   mili_convert(K, dst, src, dtype, n)                               any dtype to mil_real; src may be unaligned
//
// How exact the maths are: the largest error in units in the last place of the true result, as measured at every float from
// 1/64 to where the function is flat and at every 61st elsewhere (tests/test_kernels.c holds them to it at some millions).
// Infinities give the limits, NaN gives NaN, f(-0) is -0 where f(0) is 0.
//
//   function                where                    avx2, avx512, neon      plain, by the C library (glibc, musl)
//   exp                     everywhere               1.1                     1.1
//   tanh                    everywhere               2.6                     2.6
//   sigmoid                 everywhere               2.5                     2.5
//   erf                     everywhere               1.9                     1.9
//   gelu                    |y| from 1e-35 on        7                       4, and 4 + 2 x x for x < 0
//   silu                    |y| from 1e-35 on        3.3                     3.3
//   gelu, silu              |y| below 1e-35          as above, or 1e-43 absolute where that is more
//   gelu_grad               (it crosses 0)           2.2e-7, absolute        2.2e-7, absolute
//   silu_grad               (it crosses 0)           2e-7, absolute          2e-7, absolute

#if defined(MIL_USE_CBLAS)
#include <cblas.h>
#endif

#define MILI_REAL_IS_DOUBLE (!MIL_REAL_IS_FLOAT)

// Which SIMD tiers are compiled: float builds by gcc or clang. (gcc for Windows does not align the stack for wide vectors.)
#if !defined(MIL_NO_SIMD) && !MILI_REAL_IS_DOUBLE && (defined(__GNUC__) || defined(__clang__))
#if defined(__x86_64__) && !(defined(_WIN32) && !defined(__clang__))
#define MILI_TIERS_X86 1
#include <immintrin.h>
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define MILI_TIERS_ARM 1
#include <arm_neon.h>
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define MILI_LANES static inline __attribute__((always_inline, unused))  // arithmetic on one vector, never a call
#define MILI_PREFETCH(p) __builtin_prefetch(p)
#else
#define MILI_LANES static
#define MILI_PREFETCH(p) ((void)(p))
#endif

#define MILI_KC 256                    // products summed up in registers before C is touched
#define MILI_KC_STEP (MILI_KC + 16)    // row step of an A tile; 1024 bytes would crowd the rows into few cache sets
#define MILI_MR_MAX 12                 // rows of a tile of C, at most
#define MILI_NR_MAX 32                 // its columns, at most
#define MILI_THIN 8                    // up to this n: dot products instead of tiles
#define MILI_GEMM_BLOCK 131072         // reals of B that are in use at a time, 512 KiB: they stay in the L2 cache

// C tile [rows, nr] = start + A B, or C += A B with `add`. A: element (r, p) stands at a[r * MILI_KC_STEP + p], or, by
// column, at a[p * mr + r]. B: nr reals per p, b_step apart. start [nr]: what the accumulators of each row begin with.
typedef void mili_tile_fn(int64_t rows, int by_column, int64_t k, const mil_real *a, const mil_real *b, int64_t b_step,
                          const mil_real *start, mil_real *c, int64_t c_row, int add);

// out[r] = a_r . b for four rows a_r = a + r * a_row, all [k]; k is a multiple of `lanes`.
typedef void mili_dot4_fn(mil_real *out, const mil_real *a, int64_t a_row, const mil_real *b, int64_t k);

typedef void mili_map_fn(mil_real *y, const mil_real *x, int64_t n);
typedef void mili_zip_fn(mil_real *y, const mil_real *a, const mil_real *b, int64_t n);
typedef mil_real mili_fold_fn(const mil_real *x, int64_t n);

typedef struct mili_kernels {
    mil_cpu tier;
    const char *name;
    int lanes;                                                           // reals of a vector
    int mr, nr;                                                          // rows and columns of a tile of C
    mili_tile_fn *tile;
    mili_tile_fn *tile_pairs;                                            // the same on pairs of bfloat16, NULL: none
    mili_dot4_fn *dot4;
    mili_map_fn *exp, *tanh, *sigmoid, *erf, *gelu, *gelu_grad, *silu, *silu_grad, *relu;
    mili_zip_fn *gate, *add, *sub, *mul, *div, *mul_add, *tanh_grad, *sigmoid_grad, *relu_grad;
    void (*drop)(mil_real *y, const mil_real *x, const mil_real *u, mil_real rate, int64_t n);
    void (*axpy)(mil_real *y, mil_real a, const mil_real *x, int64_t n);
    void (*scale)(mil_real *y, const mil_real *x, mil_real a, mil_real b, int64_t n);
    mili_fold_fn *sum, *max, *min;
    mil_real (*dot)(const mil_real *x, const mil_real *y, int64_t n);
    int (*finite)(const mil_real *x, int64_t n);
    mil_real (*exp_sum)(mil_real *y, const mil_real *x, int64_t n, mil_real shift);
    void (*from_f16)(mil_real *dst, const void *src, int64_t n);
    void (*from_bf16)(mil_real *dst, const void *src, int64_t n);
    void (*to_pairs)(mil_real *dst, const mil_real *src, int64_t n);     // n reals as (n + 1) / 2 pairs of bfloat16; NULL as tile_pairs
} mili_kernels;

MILI_LANES uint64_t mili_bits(double x) { uint64_t u; memcpy(&u, &x, sizeof u); return u; }
MILI_LANES int mili_is_nan(mil_real x) { return (mili_bits((double)x) << 1) > (0x7ffull << 53); }
MILI_LANES int mili_is_low(mil_real x) { return mili_bits((double)x) == (0xfffull << 52); }            // -inf

// ---- the body of each kernel, for any vector type T_v ----------------------------------------------------------------
// A tier brings a vector type T_v of T_lanes reals and T_load, store, load_part, store_part (the first n lanes; the others
// read as 0), set, add, sub, mul, div, fma (a b + c), min, max, sum (of lanes). The vector maths also needs T_round (to
// nearest even), scale2 (x 2^n, n a whole number), pow2 (2^n, n in -126..127), abs, copysign, negative (x below 0 ? a : b),
// less (x < y ? a : b), keep_nan (x is NaN ? x : y).

// Rows of a tile: M(T, r) for r = 0, 1, ... Each accumulator is a named variable: an array of vectors may stay in memory.
#define MILI_ROWS_1(M, T) M(T, 0)
#define MILI_ROWS_2(M, T) MILI_ROWS_1(M, T) M(T, 1)
#define MILI_ROWS_4(M, T) MILI_ROWS_2(M, T) M(T, 2) M(T, 3)
#define MILI_ROWS_6(M, T) MILI_ROWS_4(M, T) M(T, 4) M(T, 5)
#define MILI_ROWS_8(M, T) MILI_ROWS_6(M, T) M(T, 6) M(T, 7)
#define MILI_ROWS_12(M, T) MILI_ROWS_8(M, T) M(T, 8) M(T, 9) M(T, 10) M(T, 11)

#define MILI_ROW_START(T, r) T##_v c##r##_0 = s0, c##r##_1 = s1;
#define MILI_ROW_FMA(T, r) \
    x = T##_set(a[r * a_row]); \
    c##r##_0 = T##_fma(x, b0, c##r##_0); \
    c##r##_1 = T##_fma(x, b1, c##r##_1);
#define MILI_ROW_STORE(T, r) \
    T##_store(c + r * c_row, c##r##_0); \
    T##_store(c + r * c_row + T##_lanes, c##r##_1);
#define MILI_ROW_ADD(T, r) \
    T##_store(c + r * c_row, T##_add(T##_load(c + r * c_row), c##r##_0)); \
    T##_store(c + r * c_row + T##_lanes, T##_add(T##_load(c + r * c_row + T##_lanes), c##r##_1));

// R rows by two vectors. Per product: two loads of B, R broadcasts of A, 2 R fused multiply-adds. a_row and a_step are
// constants at each call, so that the rows of A are reached by one pointer and fixed offsets.
#define MILI_DEFINE_TILE(T, TARGET, R) \
    MILI_LANES TARGET void T##_tile_##R(const int64_t a_row, const int64_t a_step, int64_t k, const mil_real *a, \
                                        const mil_real *b, int64_t b_step, const mil_real *start, mil_real *c, \
                                        int64_t c_row, int add) \
    { \
        const T##_v s0 = T##_load(start), s1 = T##_load(start + T##_lanes); \
        MILI_ROWS_##R(MILI_ROW_START, T) \
        for (; k > 0; k--, a += a_step, b += b_step) { \
            const T##_v b0 = T##_load(b), b1 = T##_load(b + T##_lanes); \
            MILI_PREFETCH(b + 16 * b_step);                /* wide vectors: the other half is another cache line */ \
            if (T##_lanes * sizeof(mil_real) >= 64) MILI_PREFETCH(b + 16 * b_step + T##_lanes); \
            T##_v x; \
            MILI_ROWS_##R(MILI_ROW_FMA, T) \
        } \
        if (add) { MILI_ROWS_##R(MILI_ROW_ADD, T) } \
        else { MILI_ROWS_##R(MILI_ROW_STORE, T) } \
    }

// As many tiles of R rows as fit; the next smaller R takes the rest.
#define MILI_TILES(T, R) \
    for (; rows >= R; rows -= R, c += R * c_row) { \
        if (by_column) { \
            T##_tile_##R(1, T##_mr, k, a, b, b_step, start, c, c_row, add); \
            a += R; \
        } else { \
            T##_tile_##R(MILI_KC_STEP, 1, k, a, b, b_step, start, c, c_row, add); \
            a += R * MILI_KC_STEP; \
        } \
    }

// Heights that -Os goes without: what is left of the rows then takes more passes, with the same bits.
#ifdef __OPTIMIZE_SIZE__
#define MILI_MORE_TILES(T, R)
#else
#define MILI_MORE_TILES(T, R) MILI_TILES(T, R)
#endif

#define MILI_DEFINE_TILES(T, TARGET, EACH_R) \
    MILI_FN TARGET void T##_tile(int64_t rows, int by_column, int64_t k, const mil_real *a, const mil_real *b, \
                                int64_t b_step, const mil_real *start, mil_real *c, int64_t c_row, int add) \
    { \
        EACH_R(T) \
    }

#define MILI_DEFINE_DOT4(T, TARGET) \
    MILI_FN TARGET void T##_dot4(mil_real *out, const mil_real *a, int64_t a_row, const mil_real *b, int64_t k) \
    { \
        T##_v s0 = T##_set(0), s1 = s0, s2 = s0, s3 = s0; \
        for (int64_t p = 0; p < k; p += T##_lanes, a += T##_lanes) { \
            const T##_v x = T##_load(b + p); \
            s0 = T##_fma(T##_load(a), x, s0); \
            s1 = T##_fma(T##_load(a + a_row), x, s1); \
            s2 = T##_fma(T##_load(a + 2 * a_row), x, s2); \
            s3 = T##_fma(T##_load(a + 3 * a_row), x, s3); \
        } \
        out[0] = T##_sum(s0); \
        out[1] = T##_sum(s1); \
        out[2] = T##_sum(s2); \
        out[3] = T##_sum(s3); \
    }

// y[i] = T_f(x[i]) and y[i] = T_f(a[i], b[i]); the last vector may be part of one, with zeros in the lanes past n.
#define MILI_DEFINE_MAP(T, TARGET, f) \
    MILI_FN TARGET void T##_map_##f(mil_real *y, const mil_real *x, int64_t n) \
    { \
        for (int64_t i = 0; i < n; i += T##_lanes) { \
            const int64_t left = n - i; \
            const T##_v v = T##_##f(left >= T##_lanes ? T##_load(x + i) : T##_load_part(x + i, left)); \
            if (left >= T##_lanes) T##_store(y + i, v); \
            else T##_store_part(y + i, v, left); \
        } \
    }

#define MILI_DEFINE_ZIP(T, TARGET, f) \
    MILI_FN TARGET void T##_zip_##f(mil_real *y, const mil_real *a, const mil_real *b, int64_t n) \
    { \
        int64_t i = 0; \
        for (; i + T##_lanes <= n; i += T##_lanes) T##_store(y + i, T##_##f(T##_load(a + i), T##_load(b + i))); \
        if (i < n) T##_store_part(y + i, T##_##f(T##_load_part(a + i, n - i), T##_load_part(b + i, n - i)), n - i); \
    }

// Gradients of tanh, sigmoid and relu from their results v, and dropout.
#define MILI_DEFINE_GRADS(T, TARGET) \
    MILI_LANES TARGET T##_v T##_tanh_grad(T##_v v, T##_v d) { return T##_mul(d, T##_fma(T##_sub(T##_set(0), v), v, T##_set(1))); } \
    MILI_LANES TARGET T##_v T##_sigmoid_grad(T##_v v, T##_v d) { return T##_mul(d, T##_mul(v, T##_sub(T##_set(1), v))); } \
    MILI_LANES TARGET T##_v T##_relu_grad(T##_v v, T##_v d) { return T##_less(T##_set(0), v, d, T##_set(0)); } \
    MILI_DEFINE_ZIP(T, TARGET, tanh_grad) \
    MILI_DEFINE_ZIP(T, TARGET, sigmoid_grad) \
    MILI_DEFINE_ZIP(T, TARGET, relu_grad) \
    MILI_FN TARGET void T##_drop(mil_real *y, const mil_real *x, const mil_real *u, mil_real rate, int64_t n) \
    { \
        const T##_v r = T##_set(rate), s = T##_set(1 / (1 - rate)), zero = T##_set(0); \
        int64_t i = 0; \
        for (; i + T##_lanes <= n; i += T##_lanes) T##_store(y + i, T##_less(T##_load(u + i), r, zero, T##_mul(T##_load(x + i), s))); \
        if (i < n) T##_store_part(y + i, T##_less(T##_load_part(u + i, n - i), r, zero, T##_mul(T##_load_part(x + i, n - i), s)), n - i); \
    }

// max and min: the vectors' own instruction may drop a NaN, so NaNs are gathered on the side. None: 0 stays.
#define MILI_DEFINE_EXTREME(T, TARGET, f, negative) \
    MILI_FN TARGET mil_real T##_fold_##f(const mil_real *x, int64_t n) \
    { \
        mil_real top[2 * T##_lanes], y = negative ? -MILI_INF : MILI_INF; \
        T##_v s = T##_set(y), nan = T##_set(0); \
        int64_t i = 0; \
        for (; i + T##_lanes <= n; i += T##_lanes) { \
            const T##_v v = T##_load(x + i); \
            s = T##_##f(s, v); \
            nan = T##_keep_nan(v, nan); \
        } \
        T##_store(top, s); \
        T##_store(top + T##_lanes, nan); \
        for (int j = 0; j < T##_lanes; j++) { \
            if (mili_is_nan(top[T##_lanes + j])) return top[T##_lanes + j]; \
            y = mili_pick_##f(y, top[j]); \
        } \
        for (; i < n; i++) { \
            if (mili_is_nan(x[i])) return x[i]; \
            y = mili_pick_##f(y, x[i]); \
        } \
        return y; \
    }
MILI_LANES mil_real mili_pick_max(mil_real a, mil_real b) { return a > b ? a : b; }
MILI_LANES mil_real mili_pick_min(mil_real a, mil_real b) { return a < b ? a : b; }

// Sums: four accumulators take turns, vector by vector; what is left after the last full turn goes to the first.
#define MILI_DEFINE_FOLDS(T, TARGET) \
    MILI_FN TARGET mil_real T##_fold_sum(const mil_real *x, int64_t n) \
    { \
        T##_v s0 = T##_set(0), s1 = s0, s2 = s0, s3 = s0; \
        int64_t i = 0; \
        for (; i + 4 * T##_lanes <= n; i += 4 * T##_lanes) { \
            s0 = T##_add(s0, T##_load(x + i)); \
            s1 = T##_add(s1, T##_load(x + i + T##_lanes)); \
            s2 = T##_add(s2, T##_load(x + i + 2 * T##_lanes)); \
            s3 = T##_add(s3, T##_load(x + i + 3 * T##_lanes)); \
        } \
        for (; i + T##_lanes <= n; i += T##_lanes) s0 = T##_add(s0, T##_load(x + i)); \
        if (i < n) s0 = T##_add(s0, T##_load_part(x + i, n - i)); \
        return T##_sum(T##_add(T##_add(s0, s1), T##_add(s2, s3))); \
    } \
    MILI_FN TARGET mil_real T##_fold_dot(const mil_real *x, const mil_real *y, int64_t n) \
    { \
        T##_v s0 = T##_set(0), s1 = s0, s2 = s0, s3 = s0; \
        int64_t i = 0; \
        for (; i + 4 * T##_lanes <= n; i += 4 * T##_lanes) { \
            s0 = T##_fma(T##_load(x + i), T##_load(y + i), s0); \
            s1 = T##_fma(T##_load(x + i + T##_lanes), T##_load(y + i + T##_lanes), s1); \
            s2 = T##_fma(T##_load(x + i + 2 * T##_lanes), T##_load(y + i + 2 * T##_lanes), s2); \
            s3 = T##_fma(T##_load(x + i + 3 * T##_lanes), T##_load(y + i + 3 * T##_lanes), s3); \
        } \
        for (; i + T##_lanes <= n; i += T##_lanes) s0 = T##_fma(T##_load(x + i), T##_load(y + i), s0); \
        if (i < n) s0 = T##_fma(T##_load_part(x + i, n - i), T##_load_part(y + i, n - i), s0); \
        return T##_sum(T##_add(T##_add(s0, s1), T##_add(s2, s3))); \
    } \
    /* x times 0 is 0, or NaN when x is not finite. The zero is volatile: -ffast-math would know better. */ \
    static TARGET int T##_finite(const mil_real *x, int64_t n) \
    { \
        volatile mil_real nothing = 0; \
        const T##_v zero = T##_set(nothing); \
        T##_v s0 = zero, s1 = s0, s2 = s0, s3 = s0; \
        int64_t i = 0; \
        for (; i + 4 * T##_lanes <= n; i += 4 * T##_lanes) { \
            s0 = T##_fma(zero, T##_load(x + i), s0); \
            s1 = T##_fma(zero, T##_load(x + i + T##_lanes), s1); \
            s2 = T##_fma(zero, T##_load(x + i + 2 * T##_lanes), s2); \
            s3 = T##_fma(zero, T##_load(x + i + 3 * T##_lanes), s3); \
        } \
        for (; i + T##_lanes <= n; i += T##_lanes) s0 = T##_fma(zero, T##_load(x + i), s0); \
        if (i < n) s0 = T##_fma(zero, T##_load_part(x + i, n - i), s0); \
        return !mili_is_nan(T##_sum(T##_add(T##_add(s0, s1), T##_add(s2, s3)))); \
    } \
    MILI_DEFINE_EXTREME(T, TARGET, max, 1) \
    MILI_DEFINE_EXTREME(T, TARGET, min, 0) \
    MILI_FN TARGET void T##_mul_add(mil_real *y, const mil_real *a, const mil_real *b, int64_t n) \
    { \
        int64_t i = 0; \
        for (; i + T##_lanes <= n; i += T##_lanes) T##_store(y + i, T##_fma(T##_load(a + i), T##_load(b + i), T##_load(y + i))); \
        if (i < n) \
            T##_store_part(y + i, T##_fma(T##_load_part(a + i, n - i), T##_load_part(b + i, n - i), T##_load_part(y + i, n - i)), n - i); \
    } \
    MILI_FN TARGET void T##_axpy(mil_real *y, mil_real a, const mil_real *x, int64_t n) \
    { \
        const T##_v s = T##_set(a); \
        int64_t i = 0; \
        for (; i + T##_lanes <= n; i += T##_lanes) T##_store(y + i, T##_fma(s, T##_load(x + i), T##_load(y + i))); \
        if (i < n) \
            T##_store_part(y + i, T##_fma(s, T##_load_part(x + i, n - i), T##_load_part(y + i, n - i)), n - i); \
    } \
    MILI_FN TARGET void T##_scale(mil_real *y, const mil_real *x, mil_real a, mil_real b, int64_t n) \
    { \
        const T##_v s = T##_set(a), t = T##_set(b); \
        int64_t i = 0; \
        for (; i + T##_lanes <= n; i += T##_lanes) T##_store(y + i, T##_fma(s, T##_load(x + i), t)); \
        if (i < n) T##_store_part(y + i, T##_fma(s, T##_load_part(x + i, n - i), t), n - i); \
    } \
    MILI_FN TARGET mil_real T##_exp_sum(mil_real *y, const mil_real *x, int64_t n, mil_real shift) \
    { \
        const T##_v s = T##_set(shift); \
        T##_v sum = T##_set(0); \
        for (int64_t i = 0; i < n; i += T##_lanes) { \
            const int64_t left = n - i; \
            const T##_v v = T##_exp(T##_sub(left >= T##_lanes ? T##_load(x + i) : T##_load_part(x + i, left), s)); \
            if (left >= T##_lanes) { \
                T##_store(y + i, v); \
                sum = T##_add(sum, v); \
            } else { \
                T##_store_part(y + i, v, left); \
                sum = T##_add(sum, T##_load_part(y + i, left)); \
            } \
        } \
        return T##_sum(sum); \
    }

// Vector maths for float, FMA at hand; polynomials fitted for least relative error. How exact they are stands in the banner.
// -ffast-math keeps all that but for subnormal numbers, which it may flush to 0.
#define MILI_DEFINE_MATHS(T, TARGET) \
    /* x = n log 2 + r with |r| <= (log 2) / 2; returns exp(r) - 1. log 2 in two parts: n times the first is exact. */ \
    MILI_LANES TARGET T##_v T##_expm1_part(T##_v x, T##_v *n) \
    { \
        T##_v r, q; \
        *n = T##_round(T##_mul(x, T##_set(1.44269502f))); \
        r = T##_fma(*n, T##_set(-0.693359375f), x); \
        r = T##_fma(*n, T##_set(2.12194440e-4f), r); \
        q = T##_set(0.00139466696f); \
        q = T##_fma(q, r, T##_set(0.00836671051f)); \
        q = T##_fma(q, r, T##_set(0.0416662805f)); \
        q = T##_fma(q, r, T##_set(0.16666542f)); \
        q = T##_fma(q, r, T##_set(0.5f)); \
        return T##_fma(T##_mul(r, r), q, r); \
    } \
    /* At the ends of the range the result is 0 or infinite by itself. */ \
    MILI_LANES TARGET T##_v T##_exp(T##_v x) \
    { \
        T##_v n, p = T##_expm1_part(T##_min(T##_max(x, T##_set(-104)), T##_set(89)), &n); \
        return T##_keep_nan(x, T##_scale2(T##_add(p, T##_set(1)), n)); \
    } \
    /* tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1: no cancellation near 0; 1 from |x| = 10 on. */ \
    MILI_LANES TARGET T##_v T##_tanh(T##_v x) \
    { \
        const T##_v t = T##_min(T##_abs(x), T##_set(10)); \
        T##_v n, p = T##_expm1_part(T##_add(t, t), &n), s = T##_pow2(n), e; \
        e = T##_fma(s, p, T##_sub(s, T##_set(1))); \
        return T##_keep_nan(x, T##_copysign(T##_div(e, T##_add(e, T##_set(2))), x)); \
    } \
    /* 1 / (1 + e) or e / (1 + e) with e = exp(-|x|) <= 1: nothing overflows and small results stay exact. */ \
    MILI_LANES TARGET T##_v T##_sigmoid(T##_v x) \
    { \
        const T##_v e = T##_exp(T##_sub(T##_set(0), T##_abs(x))), one = T##_set(1); \
        return T##_div(T##_negative(x, e, one), T##_add(one, e)); \
    } \
    MILI_LANES TARGET T##_v T##_gate(T##_v a, T##_v b) { return T##_mul(T##_tanh(a), T##_sigmoid(b)); } \
    MILI_LANES TARGET T##_v T##_silu(T##_v x) \
    { \
        return T##_keep_nan(x, T##_mul(T##_max(x, T##_set(-104)), T##_sigmoid(x))); \
    } \
    /* s (1 + x (1 - s)) with s = sigmoid(x) and 1 - s taken without cancellation. */ \
    MILI_LANES TARGET T##_v T##_silu_grad(T##_v x) \
    { \
        const T##_v e = T##_exp(T##_sub(T##_set(0), T##_abs(x))), one = T##_set(1), d = T##_div(one, T##_add(one, e)); \
        const T##_v s = T##_mul(T##_negative(x, e, one), d), s1 = T##_mul(T##_negative(x, one, e), d); \
        const T##_v t = T##_max(T##_min(x, T##_set(104)), T##_set(-104)); \
        return T##_keep_nan(x, T##_fma(s, T##_mul(t, s1), s)); \
    } \
    /* Upper tail of the normal distribution: Q(t) = erfc(t / sqrt 2) / 2 = *e u poly(u - 5/8), u = 1 / (1 + 5 t / 16); \
       *e = exp(-t t / 2), with the rounding error of t t put back in. */ \
    MILI_LANES TARGET T##_v T##_tail(T##_v t, T##_v *e) \
    { \
        const T##_v square = T##_mul(t, t), error = T##_fma(t, t, T##_sub(T##_set(0), square)); \
        const T##_v u = T##_div(T##_set(1), T##_fma(t, T##_set(0.3125f), T##_set(1))), v = T##_sub(u, T##_set(0.625f)); \
        T##_v p = T##_set(-0.0193274058f); \
        p = T##_fma(p, v, T##_set(-0.0158183314f)); \
        p = T##_fma(p, v, T##_set(0.0385813154f)); \
        p = T##_fma(p, v, T##_set(0.0232376773f)); \
        p = T##_fma(p, v, T##_set(-0.079057835f)); \
        p = T##_fma(p, v, T##_set(-0.0601451211f)); \
        p = T##_fma(p, v, T##_set(0.167918324f)); \
        p = T##_fma(p, v, T##_set(0.399305969f)); \
        p = T##_fma(p, v, T##_set(0.425212771f)); \
        p = T##_fma(p, v, T##_set(0.277217567f)); \
        *e = T##_exp(T##_mul(square, T##_set(-0.5f))); \
        *e = T##_fma(*e, T##_mul(error, T##_set(-0.5f)), *e); \
        return T##_mul(*e, T##_mul(p, u)); \
    } \
    /* x + x poly(x x) below 0.9, 1 - 2 Q(sqrt 2 |x|) above. */ \
    MILI_LANES TARGET T##_v T##_erf(T##_v x) \
    { \
        const T##_v t = T##_abs(x), z = T##_mul(x, x); \
        T##_v e, p, q = T##_tail(T##_min(T##_mul(t, T##_set(1.41421356f)), T##_set(15)), &e); \
        q = T##_copysign(T##_fma(q, T##_set(-2), T##_set(1)), x); \
        p = T##_set(-0.000609035837f); \
        p = T##_fma(p, z, T##_set(0.00501196273f)); \
        p = T##_fma(p, z, T##_set(-0.0267789084f)); \
        p = T##_fma(p, z, T##_set(0.112821408f)); \
        p = T##_fma(p, z, T##_set(-0.376125246f)); \
        p = T##_fma(p, z, T##_set(0.128379151f)); \
        return T##_keep_nan(x, T##_less(t, T##_set(0.9f), T##_fma(p, x, x), q)); \
    } \
    /* x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2: Q(|x|) left of 0, 1 - Q right of it. -inf gives -0. */ \
    MILI_LANES TARGET T##_v T##_gelu(T##_v x) \
    { \
        T##_v e; \
        const T##_v q = T##_tail(T##_min(T##_abs(x), T##_set(15)), &e); \
        const T##_v phi = T##_negative(x, q, T##_sub(T##_set(1), q)); \
        return T##_keep_nan(x, T##_mul(T##_max(x, T##_set(-15)), phi)); \
    } \
    /* Phi(x) + x exp(-x x / 2) / sqrt(2 pi). */ \
    MILI_LANES TARGET T##_v T##_gelu_grad(T##_v x) \
    { \
        T##_v e; \
        const T##_v q = T##_tail(T##_min(T##_abs(x), T##_set(15)), &e); \
        const T##_v t = T##_max(T##_min(x, T##_set(15)), T##_set(-15)); \
        const T##_v phi = T##_negative(x, q, T##_sub(T##_set(1), q)); \
        return T##_keep_nan(x, T##_fma(T##_mul(t, T##_set(0.398942280f)), e, phi)); \
    } \
    MILI_LANES TARGET T##_v T##_relu(T##_v x) { return T##_keep_nan(x, T##_max(T##_set(0), x)); }

// 0 where products of bfloat16 are left out: what they need besides kernels goes, too.
#ifdef MIL_NO_BF16
#define MILI_OFFERS_BF16 0
#else
#define MILI_OFFERS_BF16 1
#endif

// A kernel that only gradients use.
#ifdef MIL_NO_TRAINING
#define MILI_TRAINED(kernel) NULL
#else
#define MILI_TRAINED(kernel) kernel
#endif

// All kernels of a tier, and its table. T_exp ... T_relu and T_gate stand before it: MILI_DEFINE_MATHS, or libm.
// pairs, to_pairs: the tier's kernels on bfloat16, or NULL.
#define MILI_DEFINE_TIER(T, TARGET, EACH_R, tier, text, pairs, to_pairs) \
    MILI_DEFINE_TILES(T, TARGET, EACH_R) \
    MILI_DEFINE_DOT4(T, TARGET) \
    MILI_DEFINE_MAP(T, TARGET, exp) \
    MILI_DEFINE_MAP(T, TARGET, tanh) \
    MILI_DEFINE_MAP(T, TARGET, sigmoid) \
    MILI_DEFINE_MAP(T, TARGET, erf) \
    MILI_DEFINE_MAP(T, TARGET, gelu) \
    MILI_DEFINE_MAP(T, TARGET, gelu_grad) \
    MILI_DEFINE_MAP(T, TARGET, silu) \
    MILI_DEFINE_MAP(T, TARGET, silu_grad) \
    MILI_DEFINE_MAP(T, TARGET, relu) \
    MILI_DEFINE_ZIP(T, TARGET, gate) \
    MILI_DEFINE_ZIP(T, TARGET, add) \
    MILI_DEFINE_ZIP(T, TARGET, sub) \
    MILI_DEFINE_ZIP(T, TARGET, mul) \
    MILI_DEFINE_ZIP(T, TARGET, div) \
    MILI_DEFINE_GRADS(T, TARGET) \
    MILI_DEFINE_FOLDS(T, TARGET) \
    static const mili_kernels T##_kernels = { \
        tier, text, T##_lanes, T##_mr, 2 * T##_lanes, T##_tile, pairs, T##_dot4, \
        T##_map_exp, T##_map_tanh, T##_map_sigmoid, T##_map_erf, T##_map_gelu, MILI_TRAINED(T##_map_gelu_grad), \
        T##_map_silu, MILI_TRAINED(T##_map_silu_grad), T##_map_relu, \
        T##_zip_gate, T##_zip_add, T##_zip_sub, T##_zip_mul, T##_zip_div, T##_mul_add, \
        MILI_TRAINED(T##_zip_tanh_grad), MILI_TRAINED(T##_zip_sigmoid_grad), MILI_TRAINED(T##_zip_relu_grad), MILI_TRAINED(T##_drop), T##_axpy, T##_scale, \
        T##_fold_sum, T##_fold_max, T##_fold_min, T##_fold_dot, T##_finite, T##_exp_sum, T##_from_f16, T##_from_bf16, to_pairs };

// ---- plain C ---------------------------------------------------------------------------------------------------------
// Any compiler and CPU, float or double. A vector is four reals side by side, which compilers turn into the machine's
// own where they can; the maths are libm's.

typedef struct mili_plain_v { mil_real x, y, z, w; } mili_plain_v;
enum { mili_plain_lanes = 4, mili_plain_mr = 4 };

MILI_LANES mili_plain_v mili_plain_make(mil_real x, mil_real y, mil_real z, mil_real w)
{
    mili_plain_v v;
    v.x = x;
    v.y = y;
    v.z = z;
    v.w = w;
    return v;
}
MILI_LANES mili_plain_v mili_plain_set(mil_real x) { return mili_plain_make(x, x, x, x); }
MILI_LANES mili_plain_v mili_plain_load(const mil_real *p) { return mili_plain_make(p[0], p[1], p[2], p[3]); }
MILI_LANES mili_plain_v mili_plain_load_part(const mil_real *p, int64_t n)
{
    return mili_plain_make(n > 0 ? p[0] : 0, n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, n > 3 ? p[3] : 0);
}
MILI_LANES void mili_plain_store(mil_real *p, mili_plain_v v)
{
    p[0] = v.x;
    p[1] = v.y;
    p[2] = v.z;
    p[3] = v.w;
}
MILI_LANES void mili_plain_store_part(mil_real *p, mili_plain_v v, int64_t n)
{
    if (n > 0) p[0] = v.x;
    if (n > 1) p[1] = v.y;
    if (n > 2) p[2] = v.z;
    if (n > 3) p[3] = v.w;
}
// x87 keeps more bits in a register than in memory: sums that depend on what the compiler spills would not repeat.
#if FLT_EVAL_METHOD == 2
MILI_LANES mil_real mili_rounded(mil_real x)
{
    volatile mil_real y = x;
    return y;
}
#else
MILI_LANES mil_real mili_rounded(mil_real x) { return x; }
#endif

// a b + c. Where the CPU fuses the two, say so: a compiler left to itself fuses in one place and not in another.
#if MILI_REAL_IS_DOUBLE && defined(FP_FAST_FMA)
MILI_LANES mil_real mili_lane_fma(mil_real a, mil_real b, mil_real c) { return fma(a, b, c); }
#elif !MILI_REAL_IS_DOUBLE && defined(FP_FAST_FMAF)
MILI_LANES mil_real mili_lane_fma(mil_real a, mil_real b, mil_real c) { return fmaf(a, b, c); }
#else
MILI_LANES mil_real mili_lane_fma(mil_real a, mil_real b, mil_real c) { return mili_rounded(a * b + c); }
#endif

MILI_LANES mili_plain_v mili_plain_less(mili_plain_v x, mili_plain_v y, mili_plain_v a, mili_plain_v b)
{
    return mili_plain_make(x.x < y.x ? a.x : b.x, x.y < y.y ? a.y : b.y, x.z < y.z ? a.z : b.z, x.w < y.w ? a.w : b.w);
}
MILI_LANES mil_real mili_plain_sum(mili_plain_v v) 
{
    return mili_rounded(mili_rounded(v.x + v.z) + mili_rounded(v.y + v.w));
}
MILI_LANES mili_plain_v mili_plain_fma(mili_plain_v a, mili_plain_v b, mili_plain_v c)
{
    return mili_plain_make(mili_lane_fma(a.x, b.x, c.x), mili_lane_fma(a.y, b.y, c.y), mili_lane_fma(a.z, b.z, c.z),
                           mili_lane_fma(a.w, b.w, c.w));
}

// One lane: the formulas as in MILI_DEFINE_MATHS.
MILI_LANES mil_real mili_lane_add(mil_real a, mil_real b) { return mili_rounded(a + b); }
MILI_LANES mil_real mili_lane_sub(mil_real a, mil_real b) { return mili_rounded(a - b); }
MILI_LANES mil_real mili_lane_mul(mil_real a, mil_real b) { return mili_rounded(a * b); }
MILI_LANES mil_real mili_lane_div(mil_real a, mil_real b) { return mili_rounded(a / b); }
MILI_LANES mil_real mili_lane_max(mil_real a, mil_real b) { return a > b ? a : b; }
MILI_LANES mil_real mili_lane_min(mil_real a, mil_real b) { return a < b ? a : b; }
MILI_LANES mil_real mili_lane_keep_nan(mil_real x, mil_real y) { return mili_is_nan(x) ? x : y; }
MILI_LANES mil_real mili_lane_exp(mil_real x) { return mili_rounded(mili_exp(x)); }
MILI_LANES mil_real mili_lane_tanh(mil_real x) { return mili_rounded(mili_tanh(x)); }
MILI_LANES mil_real mili_lane_erf(mil_real x) { return mili_rounded(mili_erf(x)); }
MILI_LANES mil_real mili_lane_sigmoid(mil_real x)
{
    const mil_real e = mili_lane_exp(x < 0 ? x : -x);
    return mili_rounded((x < 0 ? e : 1) / mili_rounded(1 + e));
}
MILI_LANES mil_real mili_lane_gate(mil_real a, mil_real b) { return mili_rounded(mili_lane_tanh(a) * mili_lane_sigmoid(b)); }
MILI_LANES mil_real mili_lane_silu(mil_real x) { return mili_rounded((x < -1000 ? -1000 : x) * mili_lane_sigmoid(x)); }
MILI_LANES mil_real mili_lane_silu_grad(mil_real x)
{
    const mil_real t = x < -1000 ? -1000 : x > 1000 ? 1000 : x, s = mili_lane_sigmoid(t);
    return mili_lane_fma(s, mili_rounded(t * mili_lane_sigmoid(-t)), s);
}
MILI_LANES mil_real mili_lane_phi(mil_real t)                            // normal distribution function
{
    return mili_rounded((mil_real)0.5 * mili_erfc(mili_rounded(t * (mil_real)-0.70710678118654752440)));
}
MILI_LANES mil_real mili_lane_gelu(mil_real x)
{
    const mil_real t = x < -100 ? -100 : x;
    return mili_rounded(t * mili_lane_phi(t));
}
MILI_LANES mil_real mili_lane_gelu_grad(mil_real x)
{
    const mil_real t = x < -100 ? -100 : x > 100 ? 100 : x;
    const mil_real e = mili_lane_exp(mili_rounded((mil_real)-0.5 * t * t));
    const mil_real density = mili_rounded((mil_real)0.39894228040143267794 * e);
    return mili_lane_fma(t, density, mili_lane_phi(t));
}
MILI_LANES mil_real mili_lane_relu(mil_real x) { return mili_lane_keep_nan(x, x < 0 ? 0 : x); }

#define MILI_PLAIN_1(f) \
    MILI_LANES mili_plain_v mili_plain_##f(mili_plain_v a) \
    { \
        return mili_plain_make(mili_lane_##f(a.x), mili_lane_##f(a.y), mili_lane_##f(a.z), mili_lane_##f(a.w)); \
    }
#define MILI_PLAIN_2(f) \
    MILI_LANES mili_plain_v mili_plain_##f(mili_plain_v a, mili_plain_v b) \
    { \
        return mili_plain_make(mili_lane_##f(a.x, b.x), mili_lane_##f(a.y, b.y), mili_lane_##f(a.z, b.z), \
                               mili_lane_##f(a.w, b.w)); \
    }
MILI_PLAIN_1(exp)
MILI_PLAIN_1(tanh)
MILI_PLAIN_1(sigmoid)
MILI_PLAIN_1(erf)
MILI_PLAIN_1(gelu)
MILI_PLAIN_1(gelu_grad)
MILI_PLAIN_1(silu)
MILI_PLAIN_1(silu_grad)
MILI_PLAIN_1(relu)
MILI_PLAIN_2(gate)
MILI_PLAIN_2(add)
MILI_PLAIN_2(sub)
MILI_PLAIN_2(mul)
MILI_PLAIN_2(div)
MILI_PLAIN_2(max)
MILI_PLAIN_2(min)
MILI_PLAIN_2(keep_nan)

// Half precision: sign, 5 bits of exponent, 10 of fraction. A small number is a whole count of 2^-24.
static mil_real mili_f16_value(unsigned h)
{
    const unsigned exponent = h >> 10 & 31, fraction = h & 1023;
    uint32_t bits;
    float x;
    if (exponent == 0) {
        x = (float)fraction * (1.0f / 16777216);
        return h & 0x8000 ? (mil_real)-x : (mil_real)x;
    }
    bits = (uint32_t)(h & 0x8000) << 16 | (exponent == 31 ? 255u : exponent + 112) << 23 | (uint32_t)fraction << 13;
    if (exponent == 31 && fraction) bits |= 1u << 22;                    // a quiet NaN, as the hardware makes it
    memcpy(&x, &bits, sizeof x);
    return (mil_real)x;
}

static void mili_plain_from_f16(mil_real *dst, const void *src, int64_t n)
{
    const unsigned char *s = (const unsigned char *)src;
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, s + 2 * i, 2);
        dst[i] = mili_f16_value(h);
    }
}

static void mili_plain_from_bf16(mil_real *dst, const void *src, int64_t n)        // the upper half of a float
{
    const unsigned char *s = (const unsigned char *)src;
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        uint32_t bits;
        float x;
        memcpy(&h, s + 2 * i, 2);
        bits = (uint32_t)h << 16;
        memcpy(&x, &bits, 4);
        dst[i] = (mil_real)x;
    }
}

#define MILI_PLAIN_ROWS(T) MILI_TILES(T, 4) MILI_MORE_TILES(T, 2) MILI_TILES(T, 1)
MILI_DEFINE_TILE(mili_plain, , 1)
MILI_DEFINE_TILE(mili_plain, , 2)
MILI_DEFINE_TILE(mili_plain, , 4)
MILI_DEFINE_TIER(mili_plain, , MILI_PLAIN_ROWS, MIL_CPU_PLAIN, "plain", NULL, NULL)

#if defined(MILI_TIERS_X86)

// ---- AVX2 with FMA: 8 floats, 16 registers, tiles of 6 x 16 -----------------------------------------------------------

#define MILI_AVX2 __attribute__((target("avx2,fma,f16c")))
typedef __m256 mili_avx2_v;
enum { mili_avx2_lanes = 8, mili_avx2_mr = 6 };

MILI_LANES MILI_AVX2 __m256 mili_avx2_load(const float *p) { return _mm256_loadu_ps(p); }
MILI_LANES MILI_AVX2 void mili_avx2_store(float *p, __m256 v) { _mm256_storeu_ps(p, v); }
MILI_LANES MILI_AVX2 __m256i mili_avx2_first(int64_t n)                  // all ones in the first n lanes
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
MILI_LANES MILI_AVX2 __m256 mili_avx2_load_part(const float *p, int64_t n)
{
    return _mm256_maskload_ps(p, mili_avx2_first(n));
}
MILI_LANES MILI_AVX2 void mili_avx2_store_part(float *p, __m256 v, int64_t n)
{
    _mm256_maskstore_ps(p, mili_avx2_first(n), v);
}
MILI_LANES MILI_AVX2 __m256 mili_avx2_set(float x) { return _mm256_set1_ps(x); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_div(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
MILI_LANES MILI_AVX2 float mili_avx2_sum(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
MILI_LANES MILI_AVX2 __m256 mili_avx2_round(__m256 x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MILI_LANES MILI_AVX2 __m256 mili_avx2_power(__m256i n)                   // 2^n, n in -126..127
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
MILI_LANES MILI_AVX2 __m256 mili_avx2_pow2(__m256 n) { return mili_avx2_power(_mm256_cvtps_epi32(n)); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_scale2(__m256 x, __m256 n)         // in two steps: 2^n alone may be out of range
{
    const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, mili_avx2_power(half)), mili_avx2_power(_mm256_sub_epi32(i, half)));
}
MILI_LANES MILI_AVX2 __m256i mili_avx2_abs_bits(__m256 x)
{
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}
MILI_LANES MILI_AVX2 __m256 mili_avx2_abs(__m256 x) { return _mm256_castsi256_ps(mili_avx2_abs_bits(x)); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_copysign(__m256 x, __m256 sign)    // x is not negative
{
    return _mm256_or_ps(x, _mm256_and_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32((int)0x80000000u))));
}
MILI_LANES MILI_AVX2 __m256 mili_avx2_negative(__m256 x, __m256 a, __m256 b) { return _mm256_blendv_ps(b, a, x); }
MILI_LANES MILI_AVX2 __m256 mili_avx2_less(__m256 x, __m256 y, __m256 a, __m256 b)
{
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
MILI_LANES MILI_AVX2 __m256 mili_avx2_keep_nan(__m256 x, __m256 y)
{
    const __m256i nan = _mm256_cmpgt_epi32(mili_avx2_abs_bits(x), _mm256_set1_epi32(0x7f800000));
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(nan));
}

static MILI_AVX2 void mili_avx2_from_f16(float *dst, const void *src, int64_t n)
{
    const unsigned char *s = (const unsigned char *)src;
    for (; n >= 8; n -= 8, dst += 8, s += 16) _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)s)));
    mili_plain_from_f16(dst, s, n);
}
static MILI_AVX2 void mili_avx2_from_bf16(float *dst, const void *src, int64_t n)
{
    const unsigned char *s = (const unsigned char *)src;
    for (; n >= 8; n -= 8, dst += 8, s += 16) {
        const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)s));
        _mm256_storeu_ps(dst, _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)));
    }
    mili_plain_from_bf16(dst, s, n);
}

#define MILI_AVX2_ROWS(T) MILI_TILES(T, 6) MILI_MORE_TILES(T, 4) MILI_TILES(T, 2) MILI_TILES(T, 1)
MILI_DEFINE_TILE(mili_avx2, MILI_AVX2, 1)
MILI_DEFINE_TILE(mili_avx2, MILI_AVX2, 2)
MILI_DEFINE_TILE(mili_avx2, MILI_AVX2, 4)
MILI_DEFINE_TILE(mili_avx2, MILI_AVX2, 6)
MILI_DEFINE_MATHS(mili_avx2, MILI_AVX2)
MILI_DEFINE_TIER(mili_avx2, MILI_AVX2, MILI_AVX2_ROWS, MIL_CPU_AVX2, "avx2", NULL, NULL)

// ---- AVX-512: 16 floats, 32 registers, tiles of 12 x 32 ---------------------------------------------------------------

#define MILI_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")))
// The plain forms of some intrinsics make g++ 12 warn of its own headers; with all lanes on, maskz is the same instruction.
#define MILI_ALL16 ((__mmask16)0xffff)
#define MILI_ALL8 ((__mmask8)0xff)
typedef __m512 mili_avx512_v;
enum { mili_avx512_lanes = 16, mili_avx512_mr = 12 };

MILI_LANES MILI_AVX512 __m512 mili_avx512_load(const float *p) { return _mm512_loadu_ps(p); }
MILI_LANES MILI_AVX512 void mili_avx512_store(float *p, __m512 v) { _mm512_storeu_ps(p, v); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_load_part(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
MILI_LANES MILI_AVX512 void mili_avx512_store_part(float *p, __m512 v, int64_t n)
{
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
}
MILI_LANES MILI_AVX512 __m512 mili_avx512_set(float x) { return _mm512_set1_ps(x); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_div(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_max(__m512 a, __m512 b) { return _mm512_maskz_max_ps(MILI_ALL16, a, b); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_min(__m512 a, __m512 b) { return _mm512_maskz_min_ps(MILI_ALL16, a, b); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
MILI_LANES MILI_AVX512 float mili_avx512_sum(__m512 v)
{
    return mili_avx2_sum(_mm256_add_ps(_mm512_maskz_extractf32x8_ps(MILI_ALL8, v, 0),
                                        _mm512_maskz_extractf32x8_ps(MILI_ALL8, v, 1)));
}
MILI_LANES MILI_AVX512 __m512 mili_avx512_round(__m512 x)
{
    return _mm512_maskz_roundscale_ps(MILI_ALL16, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MILI_LANES MILI_AVX512 __m512 mili_avx512_scale2(__m512 x, __m512 n) { return _mm512_maskz_scalef_ps(MILI_ALL16, x, n); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_pow2(__m512 n) { return _mm512_maskz_scalef_ps(MILI_ALL16, _mm512_set1_ps(1), n); }
MILI_LANES MILI_AVX512 __m512i mili_avx512_abs_bits(__m512 x)
{
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
MILI_LANES MILI_AVX512 __m512 mili_avx512_abs(__m512 x) { return _mm512_castsi512_ps(mili_avx512_abs_bits(x)); }
MILI_LANES MILI_AVX512 __m512 mili_avx512_copysign(__m512 x, __m512 sign)          // x is not negative
{
    return _mm512_or_ps(x, _mm512_and_ps(sign, _mm512_castsi512_ps(_mm512_set1_epi32((int)0x80000000u))));
}
MILI_LANES MILI_AVX512 __m512 mili_avx512_negative(__m512 x, __m512 a, __m512 b)
{
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
}
MILI_LANES MILI_AVX512 __m512 mili_avx512_less(__m512 x, __m512 y, __m512 a, __m512 b)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
MILI_LANES MILI_AVX512 __m512 mili_avx512_keep_nan(__m512 x, __m512 y)
{
    return _mm512_mask_blend_ps(_mm512_cmpgt_epi32_mask(mili_avx512_abs_bits(x), _mm512_set1_epi32(0x7f800000)), y, x);
}

static MILI_AVX512 void mili_avx512_from_f16(float *dst, const void *src, int64_t n)
{
    const unsigned char *s = (const unsigned char *)src;
    for (; n >= 16; n -= 16, dst += 16, s += 32)
        _mm512_storeu_ps(dst, _mm512_maskz_cvtph_ps(MILI_ALL16, _mm256_loadu_si256((const __m256i *)s)));
    mili_plain_from_f16(dst, s, n);
}
static MILI_AVX512 void mili_avx512_from_bf16(float *dst, const void *src, int64_t n)
{
    const unsigned char *s = (const unsigned char *)src;
    for (; n >= 16; n -= 16, dst += 16, s += 32) {
        const __m512i v = _mm512_maskz_cvtepu16_epi32(MILI_ALL16, _mm256_loadu_si256((const __m256i *)s));
        _mm512_storeu_ps(dst, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(MILI_ALL16, v, 16)));
    }
    mili_plain_from_bf16(dst, s, n);
}

#define MILI_AVX512_ROWS(T) MILI_TILES(T, 12) MILI_MORE_TILES(T, 8) MILI_TILES(T, 4) MILI_MORE_TILES(T, 2) MILI_TILES(T, 1)
MILI_DEFINE_TILE(mili_avx512, MILI_AVX512, 1)
MILI_DEFINE_TILE(mili_avx512, MILI_AVX512, 2)
MILI_DEFINE_TILE(mili_avx512, MILI_AVX512, 4)
MILI_DEFINE_TILE(mili_avx512, MILI_AVX512, 8)
MILI_DEFINE_TILE(mili_avx512, MILI_AVX512, 12)
MILI_DEFINE_MATHS(mili_avx512, MILI_AVX512)

// Pairs of bfloat16: a 32-bit word holds two of them, k = 2 q in its lower half, so that rows of A and panels of B look like those
// of floats, half as long, and the same tile body serves. One instruction adds both products of a pair to each of 16 floats.
#if !defined(MIL_NO_BF16) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define MILI_AVX512_BF16 __attribute__((target("avx512bf16,avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")))
typedef __m512 mili_pairs_v;
enum { mili_pairs_lanes = 16, mili_pairs_mr = 12 };
MILI_LANES MILI_AVX512_BF16 __m512 mili_pairs_load(const float *p) { return _mm512_loadu_ps(p); }
MILI_LANES MILI_AVX512_BF16 void mili_pairs_store(float *p, __m512 v) { _mm512_storeu_ps(p, v); }
MILI_LANES MILI_AVX512_BF16 __m512 mili_pairs_set(float x) { return _mm512_set1_ps(x); }
MILI_LANES MILI_AVX512_BF16 __m512 mili_pairs_add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
MILI_LANES MILI_AVX512_BF16 __m512 mili_pairs_fma(__m512 a, __m512 b, __m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
MILI_DEFINE_TILE(mili_pairs, MILI_AVX512_BF16, 1)
MILI_DEFINE_TILE(mili_pairs, MILI_AVX512_BF16, 2)
MILI_DEFINE_TILE(mili_pairs, MILI_AVX512_BF16, 4)
MILI_DEFINE_TILE(mili_pairs, MILI_AVX512_BF16, 8)
MILI_DEFINE_TILE(mili_pairs, MILI_AVX512_BF16, 12)
MILI_DEFINE_TILES(mili_pairs, MILI_AVX512_BF16, MILI_AVX512_ROWS)

static MILI_AVX512_BF16 void mili_pairs_from(float *dst, const float *src, int64_t n)
{
    for (; n > 0; n -= 16, src += 16, dst += 8) {
        const __m512 x = n < 16 ? mili_avx512_load_part(src, n) : _mm512_loadu_ps(src);
        const __m256i words = (__m256i)_mm512_cvtneps_pbh(x);
        if (n >= 16) _mm256_storeu_si256((__m256i *)(void *)dst, words);
        else _mm256_mask_storeu_epi32(dst, (__mmask8)((1u << ((n + 1) / 2)) - 1), words);
    }
}
#define MILI_PAIRS_TILE mili_pairs_tile
#define MILI_PAIRS_FROM mili_pairs_from
#else
#define MILI_PAIRS_TILE NULL
#define MILI_PAIRS_FROM NULL
#endif
MILI_DEFINE_TIER(mili_avx512, MILI_AVX512, MILI_AVX512_ROWS, MIL_CPU_AVX512, "avx512", MILI_PAIRS_TILE, MILI_PAIRS_FROM)

// The best tier that both this CPU and its operating system support: registers must be saved at a task switch too (XCR0).
static mil_cpu mili_cpu_best(void)
{
    unsigned a, b, c, d, saved;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return MIL_CPU_PLAIN;
    if (~c & (1u << 12 | 1u << 27 | 1u << 28 | 1u << 29)) return MIL_CPU_PLAIN;              // FMA, OSXSAVE, AVX, F16C
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    if (~saved & 6) return MIL_CPU_PLAIN;                                                    // xmm, ymm
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return MIL_CPU_PLAIN;
    if (~b & 1u << 5) return MIL_CPU_PLAIN;                                                  // AVX2
    if (~saved & 0xe6) return MIL_CPU_AVX2;                                                  // mask registers, zmm
    if (~b & (1u << 16 | 1u << 17 | 1u << 30 | 1u << 31)) return MIL_CPU_AVX2;               // F, DQ, BW, VL
    return MIL_CPU_AVX512;
}

// On a CPU with AVX-512: whether it multiplies pairs of bfloat16.
MILI_FN int mili_cpu_has_pairs(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

#elif defined(MILI_TIERS_ARM)

// ---- NEON: a pair of 4 floats, 32 registers, tiles of 6 x 16 ----------------------------------------------------------

typedef float32x4x2_t mili_neon_v;
enum { mili_neon_lanes = 8, mili_neon_mr = 6 };

MILI_LANES mili_neon_v mili_neon_pair(float32x4_t a, float32x4_t b)
{
    mili_neon_v v;
    v.val[0] = a;
    v.val[1] = b;
    return v;
}
MILI_LANES mili_neon_v mili_neon_load(const float *p) { return mili_neon_pair(vld1q_f32(p), vld1q_f32(p + 4)); }
MILI_LANES void mili_neon_store(float *p, mili_neon_v v)
{
    vst1q_f32(p, v.val[0]);
    vst1q_f32(p + 4, v.val[1]);
}
MILI_LANES mili_neon_v mili_neon_load_part(const float *p, int64_t n)
{
    float part[8] = { 0, 0, 0, 0, 0, 0, 0, 0 };
    memcpy(part, p, (size_t)n * sizeof *part);
    return mili_neon_load(part);
}
MILI_LANES void mili_neon_store_part(float *p, mili_neon_v v, int64_t n)
{
    float part[8];
    mili_neon_store(part, v);
    memcpy(p, part, (size_t)n * sizeof *part);
}
MILI_LANES mili_neon_v mili_neon_set(float x) { return mili_neon_pair(vdupq_n_f32(x), vdupq_n_f32(x)); }
#define MILI_NEON_2(name, op) \
    MILI_LANES mili_neon_v mili_neon_##name(mili_neon_v a, mili_neon_v b) \
    { \
        return mili_neon_pair(op(a.val[0], b.val[0]), op(a.val[1], b.val[1])); \
    }
MILI_NEON_2(add, vaddq_f32)
MILI_NEON_2(sub, vsubq_f32)
MILI_NEON_2(mul, vmulq_f32)
MILI_NEON_2(div, vdivq_f32)
MILI_NEON_2(max, vmaxq_f32)
MILI_NEON_2(min, vminq_f32)
MILI_LANES mili_neon_v mili_neon_fma(mili_neon_v a, mili_neon_v b, mili_neon_v c)
{
    return mili_neon_pair(vfmaq_f32(c.val[0], a.val[0], b.val[0]), vfmaq_f32(c.val[1], a.val[1], b.val[1]));
}
MILI_LANES float mili_neon_sum(mili_neon_v v)
{
    const float32x4_t s = vaddq_f32(v.val[0], v.val[1]);
    return vaddvq_f32(s);
}
MILI_LANES mili_neon_v mili_neon_round(mili_neon_v x) { return mili_neon_pair(vrndnq_f32(x.val[0]), vrndnq_f32(x.val[1])); }
MILI_LANES float32x4_t mili_neon_power(int32x4_t n)                      // 2^n, n in -126..127
{
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
MILI_LANES mili_neon_v mili_neon_pow2(mili_neon_v n)
{
    return mili_neon_pair(mili_neon_power(vcvtq_s32_f32(n.val[0])), mili_neon_power(vcvtq_s32_f32(n.val[1])));
}
MILI_LANES float32x4_t mili_neon_scale4(float32x4_t x, float32x4_t n)     // in two steps: 2^n alone may be out of range
{
    const int32x4_t i = vcvtq_s32_f32(n), half = vshrq_n_s32(i, 1);
    return vmulq_f32(vmulq_f32(x, mili_neon_power(half)), mili_neon_power(vsubq_s32(i, half)));
}
MILI_NEON_2(scale2, mili_neon_scale4)
MILI_LANES mili_neon_v mili_neon_abs(mili_neon_v x) { return mili_neon_pair(vabsq_f32(x.val[0]), vabsq_f32(x.val[1])); }
MILI_LANES mili_neon_v mili_neon_choose(uint32x4_t m0, uint32x4_t m1, mili_neon_v a, mili_neon_v b)
{
    return mili_neon_pair(vbslq_f32(m0, a.val[0], b.val[0]), vbslq_f32(m1, a.val[1], b.val[1]));
}
MILI_LANES mili_neon_v mili_neon_copysign(mili_neon_v x, mili_neon_v sign)
{
    return mili_neon_choose(vdupq_n_u32(0x80000000u), vdupq_n_u32(0x80000000u), sign, x);
}
MILI_LANES mili_neon_v mili_neon_negative(mili_neon_v x, mili_neon_v a, mili_neon_v b)
{
    return mili_neon_choose(vcltzq_s32(vreinterpretq_s32_f32(x.val[0])), vcltzq_s32(vreinterpretq_s32_f32(x.val[1])), a, b);
}
MILI_LANES mili_neon_v mili_neon_less(mili_neon_v x, mili_neon_v y, mili_neon_v a, mili_neon_v b)
{
    return mili_neon_choose(vcltq_f32(x.val[0], y.val[0]), vcltq_f32(x.val[1], y.val[1]), a, b);
}
MILI_LANES uint32x4_t mili_neon_nan(float32x4_t x)
{
    return vcgtq_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fffffffu)), vdupq_n_u32(0x7f800000u));
}
MILI_LANES mili_neon_v mili_neon_keep_nan(mili_neon_v x, mili_neon_v y)
{
    return mili_neon_choose(mili_neon_nan(x.val[0]), mili_neon_nan(x.val[1]), x, y);
}

static void mili_neon_from_f16(float *dst, const void *src, int64_t n)
{
    const unsigned char *s = (const unsigned char *)src;
    for (; n >= 8; n -= 8, dst += 8, s += 16) {
        const float16x8_t h = vreinterpretq_f16_u8(vld1q_u8(s));
        vst1q_f32(dst, vcvt_f32_f16(vget_low_f16(h)));
        vst1q_f32(dst + 4, vcvt_high_f32_f16(h));
    }
    mili_plain_from_f16(dst, s, n);
}
static void mili_neon_from_bf16(float *dst, const void *src, int64_t n)
{
    const unsigned char *s = (const unsigned char *)src;
    for (; n >= 8; n -= 8, dst += 8, s += 16) {
        const uint16x8_t h = vreinterpretq_u16_u8(vld1q_u8(s));
        vst1q_f32(dst, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)));
        vst1q_f32(dst + 4, vreinterpretq_f32_u32(vshll_high_n_u16(h, 16)));
    }
    mili_plain_from_bf16(dst, s, n);
}

#define MILI_NEON_ROWS(T) MILI_TILES(T, 6) MILI_MORE_TILES(T, 4) MILI_TILES(T, 2) MILI_TILES(T, 1)
MILI_DEFINE_TILE(mili_neon, , 1)
MILI_DEFINE_TILE(mili_neon, , 2)
MILI_DEFINE_TILE(mili_neon, , 4)
MILI_DEFINE_TILE(mili_neon, , 6)
MILI_DEFINE_MATHS(mili_neon, )
MILI_DEFINE_TIER(mili_neon, , MILI_NEON_ROWS, MIL_CPU_NEON, "neon", NULL, NULL)

static mil_cpu mili_cpu_best(void) { return MIL_CPU_NEON; }              // every aarch64 has it
MILI_FN int mili_cpu_has_pairs(void) { return 0; }
#else
static mil_cpu mili_cpu_best(void) { return MIL_CPU_PLAIN; }
MILI_FN int mili_cpu_has_pairs(void) { return 0; }
#endif

// The kernels of a tier, or of the best one for MIL_CPU_AUTO. NULL: this CPU or this build lacks it.
MILI_FN const mili_kernels *mili_kernels_choose(mil_cpu wanted)
{
    const mil_cpu best = mili_cpu_best();
    if (wanted == MIL_CPU_AUTO) wanted = best;
    if (wanted == MIL_CPU_PLAIN) return &mili_plain_kernels;
#if defined(MILI_TIERS_X86)
    if (wanted == MIL_CPU_AVX2 && best != MIL_CPU_PLAIN) return &mili_avx2_kernels;
    if (wanted == MIL_CPU_AVX512 && best == MIL_CPU_AVX512) return &mili_avx512_kernels;
#elif defined(MILI_TIERS_ARM)
    if (wanted == MIL_CPU_NEON) return &mili_neon_kernels;
#endif
    return NULL;
}

// ---- GEMM: C = A B + bias, or C += A B --------------------------------------------------------------------------------
// B is packed into panels of nr columns, [panels][k][nr], zeros past column n; A is copied in tiles of mr rows by MILI_KC
// products. Loops, from the outside in:
//   - columns, in blocks of as many panels as make up a block of B: they stay in the L2 cache;
//   - k, in blocks of MILI_KC: an A tile (12 KiB) and a B panel (32 KiB) pass through L1;
//   - rows, mr at a time: one A tile, used for all panels of the block;
//   - panels: a tile of C lives in registers for the whole block of k.
// An element of C is bias + sum over its first block, plus the sum over the second, and so on: the same bits in whatever
// company. Up to MILI_THIN columns a panel would be mostly zeros: then B is packed by columns, [n][k rounded up to lanes],
// and each element is a dot product per block of k.

typedef struct mili_gemm {
    int64_t m, n, k;
    const mil_real *a;              // [m, k] element (i, p) at a[i * a_row + p * a_col]
    int64_t a_row, a_col;
    const mil_real *b;              // [k, n] element (p, j) at b[p * b_row + j * b_col]; not used when `packed`
    int64_t b_row, b_col;
    const mil_real *packed;         // B as mili_gemm_pack wrote it on the same tier, or NULL
    int pairs;                      // 1: packed by mili_gemm_pack_pairs, A is rounded alike; needs a_col 1, n > MILI_THIN, K->tile_pairs
    mil_real *c;                    // [m, n] element (i, j) at c[i * c_row + j]; must not overlap A or B
    int64_t c_row;
    int accumulate;                 // C += A B; the bias is not added
    const mil_real *bias;           // [n] or NULL
    mil_real *scratch;              // [MILI_GEMM_BLOCK], not used when `packed`
} mili_gemm;

static int64_t mili_round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Units of packing, each independent of the others: thin B is one.
MILI_FN int64_t mili_gemm_panels(const mili_kernels *K, int64_t n)
{
    return n <= MILI_THIN ? n > 0 : (n + K->nr - 1) / K->nr;
}

MILI_FN int64_t mili_gemm_packed_count(const mili_kernels *K, int64_t n, int64_t k)
{
    return n <= MILI_THIN ? n * mili_round_up(k, K->lanes) : mili_round_up(n, K->nr) * k;
}

// Panels of B that are in use at a time.
static int64_t mili_gemm_block_panels(const mili_kernels *K, int64_t k)
{
    return MILI_GEMM_BLOCK / (K->nr * MILI_MAX(1, MILI_MIN(k, MILI_KC)));
}

// For a few reals a call of memcpy takes longer than the copy.
MILI_LANES void mili_copy_few(mil_real *dst, const mil_real *src, int64_t n)
{
    for (; n >= 4; n -= 4, dst += 4, src += 4) memcpy(dst, src, 4 * sizeof *dst);
    for (; n > 0; n--) *dst++ = *src++;
}

// One panel: columns j.. of B [k, n], at most nr of them.
static void mili_pack_panel(mil_real *dst, int64_t nr, const mil_real *b, int64_t b_row, int64_t b_col, int64_t width,
                            int64_t k)
{
    if (width < nr) memset(dst, 0, (size_t)(nr * k) * sizeof *dst);
    if (b_col == 1) {
        for (int64_t p = 0; p < k; p++) mili_copy_few(dst + p * nr, b + p * b_row, width);
        return;
    }
    // Turned: four columns at a time, of so many rows that the part of the panel stays in L1.
    for (int64_t p0 = 0; p0 < k; p0 += 64) {
        const int64_t p1 = MILI_MIN(p0 + 64, k);
        int64_t j = 0;
        for (; j + 4 <= width; j += 4) {
            const mil_real *s0 = b + j * b_col, *s1 = s0 + b_col, *s2 = s1 + b_col, *s3 = s2 + b_col;
            int64_t p = p0;
#if defined(MILI_TIERS_X86)
            for (; b_row == 1 && p + 4 <= p1; p += 4) {
                __m128 r0 = _mm_loadu_ps(s0 + p), r1 = _mm_loadu_ps(s1 + p), r2 = _mm_loadu_ps(s2 + p), r3 = _mm_loadu_ps(s3 + p);
                _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
                float *d = dst + p * nr + j;
                _mm_storeu_ps(d, r0);
                _mm_storeu_ps(d + nr, r1);
                _mm_storeu_ps(d + 2 * nr, r2);
                _mm_storeu_ps(d + 3 * nr, r3);
            }
#endif
            for (; p < p1; p++) {
                mil_real *d = dst + p * nr + j;
                d[0] = s0[p * b_row];
                d[1] = s1[p * b_row];
                d[2] = s2[p * b_row];
                d[3] = s3[p * b_row];
            }
        }
        for (; j < width; j++)
            for (int64_t p = p0; p < p1; p++) dst[p * nr + j] = b[p * b_row + j * b_col];
    }
}

// Vectors of k reals, `step` apart in memory, zero padded to `padded`.
static void mili_pack_vector(mil_real *dst, const mil_real *x, int64_t step, int64_t k, int64_t padded)
{
    if (step == 1) memcpy(dst, x, (size_t)k * sizeof *dst);
    else
        for (int64_t p = 0; p < k; p++) dst[p] = x[p * step];
    for (int64_t p = k; p < padded; p++) dst[p] = 0;
}

MILI_FN void mili_gemm_pack_panels(const mili_kernels *K, mil_real *dst, const mil_real *b, int64_t b_row, int64_t b_col,
                                   int64_t n, int64_t k, int64_t first, int64_t end)
{
    if (k == 0) return;
    if (n <= MILI_THIN) {
        const int64_t padded = mili_round_up(k, K->lanes);
        if (first == 0 && end > 0)
            for (int64_t j = 0; j < n; j++) mili_pack_vector(dst + j * padded, b + j * b_col, b_row, k, padded);
        return;
    }
    for (int64_t i = first; i < end; i++) {
        const int64_t j = i * K->nr;
        mili_pack_panel(dst + j * k, K->nr, b + j * b_col, b_row, b_col, MILI_MIN(n - j, K->nr), k);
    }
}

MILI_FN void mili_gemm_pack(const mili_kernels *K, mil_real *dst, const mil_real *b, int64_t b_row, int64_t b_col, int64_t n,
                            int64_t k)
{
    mili_gemm_pack_panels(K, dst, b, b_row, b_col, n, k, 0, mili_gemm_panels(K, n));
}

// The same panels of pairs of bfloat16, each as long as (k + 1) / 2 words; an odd k ends with a zero.
MILI_LANES uint32_t mili_to_bfloat(mil_real x)
{
    const float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffff) > 0x7f800000) return u >> 16 | 0x40;            // a NaN stays one
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;                           // to nearest, ties to even
}

MILI_FN void mili_gemm_pack_pairs(const mili_kernels *K, mil_real *dst, const mil_real *b, int64_t b_row, int64_t b_col,
                                  int64_t n, int64_t k, int64_t first, int64_t end)
{
    const int64_t nr = K->nr, words = (k + 1) / 2;
    for (int64_t i = first; i < end; i++)
        for (int64_t q = 0; q < words; q++)
            for (int64_t c = 0; c < nr; c++) {
                const mil_real *at = b + (i * nr + c) * b_col + 2 * q * b_row;
                uint32_t word = 0;
                if (i * nr + c < n) word = mili_to_bfloat(at[0]) | (2 * q + 1 < k ? mili_to_bfloat(at[b_row]) << 16 : 0);
                memcpy(dst + (i * words + q) * nr + c, &word, sizeof word);
            }
}

// n <= MILI_THIN: four rows of A by one column of B at a time.
static void mili_gemm_thin(const mili_kernels *K, const mili_gemm *g)
{
    mil_real rows[4 * MILI_KC_STEP], out[4];
    const int64_t padded = mili_round_up(g->k, K->lanes);
    for (int64_t p = 0; p < g->k; p += MILI_KC) {
        const int64_t depth = MILI_MIN(g->k - p, MILI_KC), full = mili_round_up(depth, K->lanes);
        const mil_real *b = g->packed ? g->packed + p : g->scratch;
        const int64_t b_step = g->packed ? padded : full;
        const int add = p > 0 || g->accumulate;
        if (!g->packed)
            for (int64_t j = 0; j < g->n; j++)
                mili_pack_vector(g->scratch + j * full, g->b + p * g->b_row + j * g->b_col, g->b_row, depth, full);
        for (int64_t i = 0; i < g->m; i += 4) {
            const int64_t count = MILI_MIN(g->m - i, 4);
            const mil_real *a = g->a + i * g->a_row + p * g->a_col;
            int64_t a_row = g->a_row;
            if (g->a_col != 1 || full != depth || count < 4) {           // rows that cannot be read as they stand
                for (int64_t r = 0; r < count; r++)
                    mili_pack_vector(rows + r * MILI_KC_STEP, a + r * g->a_row, g->a_col, depth, full);
                for (int64_t r = count; r < 4; r++) memset(rows + r * MILI_KC_STEP, 0, (size_t)full * sizeof *rows);
                a = rows;
                a_row = MILI_KC_STEP;
            }
            for (int64_t j = 0; j < g->n; j++) {
                K->dot4(out, a, a_row, b + j * b_step, full);
                for (int64_t r = 0; r < count; r++) {
                    mil_real *c = g->c + (i + r) * g->c_row + j;
                    *c = (add ? *c : g->bias ? g->bias[j] : 0) + out[r];
                }
            }
        }
    }
}

// One tile of rows by all columns of one panel. A tile at the right edge is worked out aside, whole, and then cut.
static void mili_gemm_panel(const mili_kernels *K, mili_tile_fn *run, int64_t rows, int by_column, int64_t k,
                            const mil_real *a, const mil_real *b, int64_t b_step, const mil_real *start, mil_real *c,
                            int64_t c_row, int64_t width, int add)
{
    mil_real tile[MILI_MR_MAX * MILI_NR_MAX];
    if (width == K->nr) {
        run(rows, by_column, k, a, b, b_step, start, c, c_row, add);
        return;
    }
    memset(tile, 0, sizeof tile);
    if (add)
        for (int64_t r = 0; r < rows; r++) memcpy(tile + r * K->nr, c + r * c_row, (size_t)width * sizeof *c);
    run(rows, by_column, k, a, b, b_step, start, tile, K->nr, add);
    for (int64_t r = 0; r < rows; r++) memcpy(c + r * c_row, tile + r * K->nr, (size_t)width * sizeof *c);
}

#if defined(MIL_USE_CBLAS)
// The same product by the CBLAS, where its parameters can say it: one of A's steps is 1, one of B's is 1, all fit an int. B is
// taken unpacked (nothing is packed in such a build). Returns 0 for what it cannot say.
static int mili_gemm_cblas(const mili_gemm *g)
{
    const int a_turned = g->a_col != 1, b_turned = g->b_col != 1;
    const int64_t lda = MILI_MAX(a_turned ? g->a_col : g->a_row, a_turned ? g->m : g->k);
    const int64_t ldb = MILI_MAX(b_turned ? g->b_col : g->b_row, b_turned ? g->k : g->n);
    if (g->m < 1 || g->n < 1 || (a_turned && g->a_row != 1) || (b_turned && g->b_row != 1)) return 0;
    if ((a_turned ? g->a_col : g->a_row) < lda && (a_turned ? g->k : g->m) > 1) return 0;            // rows that overlap or run backwards
    if ((b_turned ? g->b_col : g->b_row) < ldb && (b_turned ? g->n : g->k) > 1) return 0;
    if (g->c_row < g->n && g->m > 1) return 0;
    if (MILI_MAX(MILI_MAX(g->m, g->n), g->k) > INT_MAX || MILI_MAX(MILI_MAX(lda, ldb), g->c_row) > INT_MAX) return 0;
    const int add = g->accumulate || g->bias != NULL;
    if (g->bias && !g->accumulate)
        for (int64_t i = 0; i < g->m; i++) memcpy(g->c + i * g->c_row, g->bias, (size_t)g->n * sizeof *g->c);
#if MIL_REAL_IS_FLOAT
    cblas_sgemm(
#else
    cblas_dgemm(
#endif
        CblasRowMajor, a_turned ? CblasTrans : CblasNoTrans, b_turned ? CblasTrans : CblasNoTrans, (int)g->m, (int)g->n, (int)g->k, 1,
        g->a, (int)lda, g->b, (int)ldb, add ? (mil_real)1 : (mil_real)0, g->c, (int)MILI_MAX(g->c_row, g->n));
    return 1;
}
#endif

MILI_FN void mili_gemm_run(const mili_kernels *K, const mili_gemm *g)
{
    mil_real a_tile[MILI_MR_MAX * MILI_KC_STEP], start[MILI_NR_MAX];
    const int pairs = MILI_OFFERS_BF16 && g->pairs;
    const int64_t each = pairs ? 2 : 1, k = (g->k + each - 1) / each;     // k counts words of `each` numbers from here on
    const int64_t nr = K->nr, mr = K->mr, block = mili_gemm_block_panels(K, k) * nr;
    mili_tile_fn *tile = pairs ? K->tile_pairs : K->tile;
    MIL_ASSERT(!g->pairs || (g->packed && tile && g->a_col == 1 && g->n > MILI_THIN));
    if (g->m <= 0 || g->n <= 0) return;
    if (g->k <= 0) {
        if (g->accumulate) return;
        for (int64_t i = 0; i < g->m; i++)
            for (int64_t j = 0; j < g->n; j++) g->c[i * g->c_row + j] = g->bias ? g->bias[j] : 0;
        return;
    }
#if defined(MIL_USE_CBLAS)
    if (!g->packed && mili_gemm_cblas(g)) return;
#endif
    if (g->n <= MILI_THIN) {
        mili_gemm_thin(K, g);
        return;
    }
    for (int64_t j0 = 0; j0 < g->n; j0 += block) {
        const int64_t j1 = MILI_MIN(j0 + block, g->n);
        for (int64_t p = 0; p < k; p += MILI_KC) {
            const int64_t depth = MILI_MIN(k - p, MILI_KC);
            const int add = p > 0 || g->accumulate, by_column = g->a_row == 1 && g->a_col != 1;
            const mil_real *bias = add ? NULL : g->bias;
            // With few rows, whole panels of a row-major B are read where they stand: packing would cost more than the rest.
            const int in_place = !g->packed && g->b_col == 1 && g->m <= mr;
            memset(start, 0, sizeof start);
            if (!g->packed)
                for (int64_t j = j0; j < j1; j += nr)
                    if (!in_place || g->n - j < nr)
                        mili_pack_panel(g->scratch + (j - j0) * depth, nr, g->b + p * g->b_row + j * g->b_col, g->b_row,
                                        g->b_col, MILI_MIN(g->n - j, nr), depth);
            for (int64_t i = 0; i < g->m; i += mr) {
                const int64_t rows = MILI_MIN(g->m - i, mr);
                const mil_real *a = g->a + i * g->a_row + each * p * g->a_col;
                if (pairs) {
                    for (int64_t r = 0; r < rows; r++)
                        K->to_pairs(a_tile + r * MILI_KC_STEP, a + r * g->a_row, MILI_MIN(2 * depth, g->k - 2 * p));
                } else if (by_column) {                                         // rows side by side in memory: keep them so
                    for (int64_t q = 0; q < depth; q++)
                        mili_copy_few(a_tile + q * mr, a + q * g->a_col, rows);
                } else {
                    for (int64_t r = 0; r < rows; r++)
                        mili_pack_vector(a_tile + r * MILI_KC_STEP, a + r * g->a_row, g->a_col, depth, depth);
                }
                // The tile of A that comes next is fetched meanwhile, a strip of its columns per panel; so are the rows of C that
                // a panel adds to, which are needed after its last product.
                const int64_t line = 64 / (int64_t)sizeof(mil_real), strip = (depth * nr + (j1 - j0) - 1) / (j1 - j0);
                const mil_real *next = a;
                int64_t next_rows = 0;
                if (i + mr < g->m && (by_column || g->a_col == 1)) {
                    next = a + mr * g->a_row;
                    next_rows = MILI_MIN(g->m - i - mr, mr);
                } else if (p + depth < k && (by_column || g->a_col == 1)) {
                    next = g->a + each * (p + depth) * g->a_col;
                    next_rows = MILI_MIN(g->m, mr);
                }
                for (int64_t j = j0; j < j1; j += nr) {
                    const int64_t width = MILI_MIN(g->n - j, nr);
                    const int64_t first = (j - j0) / nr * strip, end = MILI_MIN(first + strip, depth);
                    if (by_column)
                        for (int64_t q = first; q < end && next_rows; q++) {
                            MILI_PREFETCH(next + q * g->a_col);
                            MILI_PREFETCH(next + q * g->a_col + next_rows - 1);
                        }
                    else
                        for (int64_t r = 0; r < next_rows; r++)
                            for (int64_t q = each * first; q < each * end; q += line) MILI_PREFETCH(next + r * g->a_row + q);
                    for (int64_t r = 0; r < rows && add; r++)
                        for (int64_t q = 0; q < width; q += line) MILI_PREFETCH(g->c + (i + r) * g->c_row + j + q);
                    const mil_real *b = g->packed ? g->packed + j * k + p * nr : g->scratch + (j - j0) * depth;
                    int64_t b_step = nr;
                    if (in_place && width == nr) {
                        b = g->b + p * g->b_row + j;
                        b_step = g->b_row;
                    }
                    if (bias)
                        for (int64_t q = 0; q < nr; q++) start[q] = q < width ? bias[j + q] : 0;
                    mili_gemm_panel(K, tile, rows, by_column, depth, a_tile, b, b_step, start, g->c + i * g->c_row + j, g->c_row,
                                    width, add);
                }
            }
        }
    }
}

// ---- softmax of a row ---------------------------------------------------------------------------------------------------
// y = exp(x - max x) / sum. All -inf (everything masked) gives zeros; a NaN gives NaNs. Empty rows are fine.
MILI_FN void mili_softmax_row(const mili_kernels *K, mil_real *y, const mil_real *x, int64_t n)
{
    const mil_real top = K->max(x, n);
    if (mili_is_low(top)) {
        for (int64_t i = 0; i < n; i++) y[i] = 0;
        return;
    }
    K->scale(y, y, 1 / K->exp_sum(y, x, n, top), 0, n);
}

// ---- conversions --------------------------------------------------------------------------------------------------------

#define MILI_CONVERT(type) \
    for (int64_t i = 0; i < n; i++) { \
        type x; \
        memcpy(&x, s + i * (int64_t)sizeof x, sizeof x); \
        dst[i] = (mil_real)x; \
    }

// dst[i] = src[i]; src is any memory, aligned or not. A bool is 0 or 1, whatever its byte.
MILI_FN void mili_convert(const mili_kernels *K, mil_real *dst, const void *src, mil_dtype dtype, int64_t n)
{
    const unsigned char *s = (const unsigned char *)src;
    if (n <= 0) return;
    if (dtype == (MILI_REAL_IS_DOUBLE ? MIL_F64 : MIL_F32)) {
        memcpy(dst, src, (size_t)n * sizeof *dst);
        return;
    }
    switch (dtype) {
    case MIL_F32:
        MILI_CONVERT(float)
        break;
    case MIL_F64:
        MILI_CONVERT(double)
        break;
    case MIL_F16: K->from_f16(dst, src, n); break;
    case MIL_BF16: K->from_bf16(dst, src, n); break;
    case MIL_I8: MILI_CONVERT(int8_t) break;
    case MIL_U8: MILI_CONVERT(uint8_t) break;
    case MIL_I16: MILI_CONVERT(int16_t) break;
    case MIL_U16: MILI_CONVERT(uint16_t) break;
    case MIL_I32: MILI_CONVERT(int32_t) break;
    case MIL_U32: MILI_CONVERT(uint32_t) break;
    case MIL_I64: MILI_CONVERT(int64_t) break;
    case MIL_U64: MILI_CONVERT(uint64_t) break;
    case MIL_BOOL:
        for (int64_t i = 0; i < n; i++) dst[i] = s[i] != 0;
        break;
    case MIL_DTYPE_COUNT: break;
    }
}

MILI_FN int mili_tensor_packed(const mil_tensor *t)
{
    int64_t step = (int64_t)mil_dtype_size(t->dtype);
    int any = 0;
    for (int a = 0; a < t->rank; a++) any |= t->stride[a] != 0;
    if (!any) return 1;
    for (int a = t->rank - 1; a >= 0; a--) {
        if (t->shape[a] != 1 && t->stride[a] != step) return 0;
        step *= t->shape[a];
    }
    return 1;
}

// Strides in bytes, also for a packed tensor that left them zero.
MILI_FN void mili_tensor_strides(const mil_tensor *t, int64_t *stride)
{
    int64_t step = (int64_t)mil_dtype_size(t->dtype);
    const int packed = mili_tensor_packed(t);
    for (int a = t->rank - 1; a >= 0; a--) {
        stride[a] = packed ? step : t->stride[a];
        step *= t->shape[a];
    }
}

// One element as an index: integers exactly; what no int64_t holds becomes -1, which no op takes for an index.
MILI_FN int64_t mili_integer_at(const mili_kernels *K, const char *src, mil_dtype dtype)
{
    int64_t i64;
    uint32_t u32;
    int32_t i32;
    mil_real real;
    double value;
    switch (dtype) {
    case MIL_I64:
    case MIL_U64: memcpy(&i64, src, sizeof i64); return dtype == MIL_U64 && i64 < 0 ? -1 : i64;
    case MIL_U32: memcpy(&u32, src, sizeof u32); return (int64_t)u32;
    case MIL_I32: memcpy(&i32, src, sizeof i32); return i32;
    case MIL_F64: memcpy(&value, src, sizeof value); break;
    default:      mili_convert(K, &real, src, dtype, 1); value = (double)real;
    }
    return value > -9.2e18 && value < 9.2e18 ? (int64_t)value : -1;
}

// Rows `row` .. `row` + `rows` - 1 of t, whose first element stands at `data`, to packed mil_real or, for MIL_I64, int64_t.
MILI_FN void mili_convert_rows(const mili_kernels *K, const mil_tensor *t, const void *data, int64_t row, int64_t rows, mil_dtype dtype, void *out)
{
    int64_t stride[MIL_MAX_RANK];
    mili_tensor_strides(t, stride);
    const int64_t cols = t->rank ? t->shape[t->rank - 1] : 1, step = t->rank ? stride[t->rank - 1] : 0, width = (int64_t)mil_dtype_size(t->dtype);
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = row + r;
        const char *src = (const char *)data;
        for (int a = t->rank - 2; a >= 0; a--) {           // the row's number, axis by axis
            src += at % t->shape[a] * stride[a];
            at /= t->shape[a];
        }
        if (dtype == MIL_I64) {
            int64_t *dst = (int64_t *)out + r * cols;
            for (int64_t j = 0; j < cols; j++) dst[j] = mili_integer_at(K, src + j * step, t->dtype);
        } else if (step == width) mili_convert(K, (mil_real *)out + r * cols, src, t->dtype, cols);
        else for (int64_t j = 0; j < cols; j++) mili_convert(K, (mil_real *)out + r * cols + j, src + j * step, t->dtype, 1);
    }
}

// ---- creating a context (after the kernels, which it chooses) ----
MIL_DEF mil_context_options mil_context_options_default(void)
{
    mil_context_options options;
    memset(&options, 0, sizeof options);
    return options;
}

MIL_DEF mil_status mil_context_create(mil_context **out, const mil_context_options *options)
{
    mil_context_options o = options ? *options : mil_context_options_default();
    mil_allocator allocator = o.allocator;
    if (!out) return MIL_ERROR_ARGUMENT;
    *out = NULL;
    if (o.threads < 0 || (o.parallel.run && o.parallel.threads < 0)) return MIL_ERROR_ARGUMENT;
    if (o.precision != MIL_PRECISION_FULL && o.precision != MIL_PRECISION_BF16) return MIL_ERROR_ARGUMENT;
    if (o.memory_size && !o.memory) return MIL_ERROR_ARGUMENT;         // the caller's block could not be had: no heap instead of it
    const mili_kernels *kernels = mili_kernels_choose(o.cpu);
    if (!kernels) return MIL_ERROR_UNSUPPORTED;

    if (o.memory) {                                        // the heap's head stands at the block's start, aligned
        const size_t gap = (MILI_PIECE - (size_t)((uintptr_t)o.memory % MILI_PIECE)) % MILI_PIECE;
        if (o.memory_size < gap + 4 * MILI_PIECE + sizeof(mil_context)) return MIL_ERROR_ARGUMENT;
        mili_block_heap *heap = (mili_block_heap *)(void *)((char *)o.memory + gap);
        heap->free = (mili_free_piece *)(void *)((char *)heap + MILI_PIECE);
        heap->free->size = (o.memory_size - gap - MILI_PIECE) / MILI_PIECE * MILI_PIECE;
        heap->free->next = NULL;
        allocator.reallocate = mili_block_reallocate;
        allocator.user = heap;
    } else if (!allocator.reallocate) {
        allocator.reallocate = mili_default_reallocate;
    }

    mil_context *ctx = (mil_context *)mili_allocate_with(&allocator, sizeof *ctx);
    if (!ctx) return MIL_ERROR_NO_MEMORY;
    memset(ctx, 0, sizeof *ctx);
    ctx->allocator = allocator;
    ctx->kernels = kernels;
#if !defined(MIL_USE_CBLAS)
    if (o.precision == MIL_PRECISION_BF16 && kernels->tile_pairs && mili_cpu_has_pairs()) ctx->precision = MIL_PRECISION_BF16;
#endif
    ctx->threads = 1;
    ctx->parallel = o.parallel;
    if (o.parallel.run) {
        ctx->threads = MILI_MAX(1, MILI_MIN(o.parallel.threads, MILI_MAX_SLOTS));
    }
#if MILI_THREADS
    else if (o.threads != 1) {
        const int wanted = MILI_MIN(o.threads ? o.threads : mili_cpu_count(), MILI_MAX_SLOTS);
        if (wanted > 1) {
            ctx->pool = mili_pool_create(ctx, wanted - 1);
            if (!ctx->pool) { mil_context_free(ctx); return MIL_ERROR_NO_MEMORY; }
            ctx->threads = ctx->pool->workers + 1;
        }
    }
#endif
    ctx->backend = o.backend;
    if (ctx->backend && ctx->backend->open) {
        const mil_status status = ctx->backend->open(&ctx->backend_self, ctx);
        if (status != MIL_OK) {
            ctx->backend = NULL;                           // it did not open, so it is not closed
            mil_context_free(ctx);
            return status;
        }
    }
    mili_enter(ctx);
    *out = ctx;
    return MIL_OK;
}

MIL_DEF void mil_context_free(mil_context *ctx)
{
    if (!ctx) return;
    if (ctx->backend && ctx->backend->close) ctx->backend->close(ctx->backend_self, ctx);
#if MILI_THREADS
    mili_pool_free(ctx, ctx->pool);
#endif
    mili_free(ctx, (void *)ctx->registered, (size_t)ctx->registered_count * sizeof *ctx->registered);
    const mil_allocator allocator = ctx->allocator;
    mili_release_with(&allocator, ctx, sizeof *ctx);
}

MIL_DEF const char *mil_context_cpu(const mil_context *ctx) { return ctx ? ctx->kernels->name : ""; }

// ==== >>record: nodes, shapes, random draws =======================================================================

// mil_op.flags: ROWS that reads no computed value; that costs no more than reading it back; that is a small part of a step
enum { MILI_OP_SOURCE = 1 << 8, MILI_OP_CHEAP = 1 << 9, MILI_OP_LIGHT = 1 << 10 };
enum {                                                     // mil_node.flags
    MILI_KEEP = 1,                                         // read after the run
    MILI_WANTS_GRAD = 2,                                   // a parameter or marked input stands below it
    MILI_KEPT = 4,                                         // kept when its run was planned, so that its memory is its own
    MILI_NEEDED = 8,                                       // for the present plan
    MILI_BACKWARD = 16                                     // recorded by mil_tape_backward
};

enum { MILI_MAX_SCOPES = 64 };                             // deeper ones are counted, not named
typedef struct mili_draw { const char *name; mil_tensor values; } mili_draw;
typedef struct mili_update { mil_param *param; mil_node *value; } mili_update;
typedef struct mili_plan mili_plan;
typedef struct mili_workspace { char *memory; size_t bytes; } mili_workspace;

struct mil_tape {
    mil_context *ctx;
    mili_arena   arena;                                    // nodes, names, plans: all gone at a reset
    mil_node   **node;
    int64_t      count, capacity;
    int64_t      ran;                                      // nodes before this one belong to earlier runs
    int          training, backward_done, in_backward;
    unsigned     options;                                  // 1 << mil_tape_option
    uint64_t     seed, step;
    mili_draw   *draw;
    int64_t      draw_count, draw_capacity;
    mili_update *update;
    int64_t      update_count, update_capacity, updates_ran;
    mil_node   **used;                                     // hash table: leaf node of a parameter
    int64_t      used_size, used_count;
    struct { const char *name; int64_t times; } *drawn;    // names drawn so far, to number repeats
    int64_t      drawn_count, drawn_capacity;
    char         layer[256];                               // scopes pushed, joined by dots
    int          layer_start[MILI_MAX_SCOPES], scopes;     // where each begins; a scope may hold dots of its own
    const char  *layer_interned;
    mil_status   status;
    char         error[MILI_ERROR_SIZE];
    mili_plan   *plan;                                     // of the last run, for reruns
    mili_workspace *workspace;                             // one block per run since the reset, kept over a reset
    int64_t      workspace_count, workspace_capacity, workspace_used;
    char        *user_memory;
    size_t       user_bytes, user_used;
    int64_t      stream_rows;                              // > 0: rows of the bag so far, where the tape says `stream_capacity`
    int64_t      stream_capacity;
    const mil_node *streamed;                              // the input that is pushed
};

// What the planner and the executor know of a node.
typedef struct mili_plan_node {
    mil_node *present;                                     // this source recorded once more, in a later run
    mil_node *converted[2];                                // this foreign-dtype input as mil_real, as index
    mil_node *base;                                        // whose memory this is: itself, or for a view the first non-view below
    int       stage, latest, listed;                       // listed: 1 when it stands in a step
    int       first, last;                                 // steps between which its memory is taken
    int       last_reader;                                 // in its group
    int       step, stored, uses;                          // its step; 1: must exist whole; readers, of a row value that need not
    int       later, again;                                // 1: a later group reads it; 1: light enough to be computed again there
    mil_node *copy;                                        // that runs again in step copy_step
    int       copy_step;
    struct mili_plan_node *next_copy;                      // of a plan's list of copies
    mil_node *node;                                        // a copy's node
    int       place;                                       // MILI_PLACE_*
    int64_t   home;                                        // inputs in a backend's memory: 1 + the first node of the run that holds them
    size_t    offset, bytes;                               // in the workspace, or within a slot for a tile
    size_t    state_offset, state_bytes;                   // reductions: of partition 0, of one partition
    size_t    prepared_offset, prepared_bytes;
    int       deferred;                                    // a reduction that runs over whole waves
    char     *state, *prepared;
    int64_t   row_base;                                    // a streamed input: the row that data points to
} mili_plan_node;

MIL_DEF mil_node *mil_tape_fail(mil_tape *tape, mil_status status, const char *format, ...)
{
    if (!tape || tape->status != MIL_OK) return NULL;
    tape->status = status;
    size_t at = 0;
    if (tape->layer[0]) at = (size_t)snprintf(tape->error, sizeof tape->error, "%s: ", tape->layer);
    va_list args;
    va_start(args, format);
    vsnprintf(tape->error + at, sizeof tape->error - at, format, args);
    va_end(args);
    return NULL;
}

// For allocation failures while recording. The context may still hold the error of an earlier call.
MILI_FN mil_node *mili_tape_fail_ctx(mil_tape *tape)
{
    return mil_tape_fail(tape, MIL_ERROR_NO_MEMORY, "%s", tape->ctx->status == MIL_ERROR_NO_MEMORY ? tape->ctx->error : "no memory to record an op");
}

// What a call that records ends with: the tape's status, and its sentence in the context.
MILI_FN mil_status mili_tape_report(const mil_tape *tape)
{
    mili_enter(tape->ctx);
    return tape->status == MIL_OK ? MIL_OK : mili_fail(tape->ctx, tape->status, "%s", tape->error);
}

typedef struct mili_text { char s[200]; } mili_text;       // eight axes of any length

MILI_FN mili_text mili_shape_text(int rank, const int64_t *shape)          // "[1000, 512]"
{
    mili_text t;
    size_t at = 0;
    t.s[at++] = '[';
    for (int a = 0; a < rank; a++)
        at += (size_t)snprintf(t.s + at, sizeof t.s - at, a ? ", %lld" : "%lld", (long long)shape[a]);
    t.s[at++] = ']';
    t.s[at] = 0;
    return t;
}
#define MILI_SHAPE(n) (mili_shape_text((n)->rank, (n)->shape).s)

MIL_DEF mil_status mil_tape_create(mil_context *ctx, mil_tape **out)
{
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!out) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_tape_create: out is NULL");
    *out = (mil_tape *)mili_alloc_zero(ctx, sizeof **out);
    if (!*out) return MIL_ERROR_NO_MEMORY;
    (*out)->ctx = ctx;
    (*out)->layer_interned = "";
    return MIL_OK;
}

MILI_FN void mili_backend_release(mil_context *ctx, void *p, size_t bytes)
{
    if (!p) return;
    if (!ctx->backend) mili_free(ctx, p, bytes);
    else ctx->backend->release(ctx->backend_self, ctx, p, bytes);
}

MILI_FN void *mili_backend_alloc(mil_context *ctx, size_t bytes)
{
    if (!ctx->backend) return mili_alloc(ctx, bytes);
    void *p = ctx->backend->allocate(ctx->backend_self, ctx, bytes);
    if (!p) mili_fail(ctx, MIL_ERROR_NO_MEMORY, "backend %s: no memory for %llu bytes", ctx->backend->name, (unsigned long long)bytes);
    return p;
}

MILI_FN int mili_host_memory(const mil_context *ctx) { return !ctx->backend || ctx->backend->host_memory; }

MILI_FN mil_status mili_upload(mil_context *ctx, void *dst, const void *src, size_t bytes)
{
    if (bytes == 0) return MIL_OK;
    if (mili_host_memory(ctx)) { memmove(dst, src, bytes); return MIL_OK; }
    if (ctx->backend->upload(ctx->backend_self, dst, src, bytes) == MIL_OK) return MIL_OK;
    return mili_fail(ctx, MIL_ERROR_BACKEND, "backend %s: upload of %llu bytes failed", ctx->backend->name, (unsigned long long)bytes);
}

MILI_FN mil_status mili_download(mil_context *ctx, void *dst, const void *src, size_t bytes)
{
    if (bytes == 0) return MIL_OK;
    if (mili_host_memory(ctx)) { memmove(dst, src, bytes); return MIL_OK; }
    if (ctx->backend->download(ctx->backend_self, dst, src, bytes) == MIL_OK) return MIL_OK;
    return mili_fail(ctx, MIL_ERROR_BACKEND, "backend %s: download of %llu bytes failed", ctx->backend->name, (unsigned long long)bytes);
}

MIL_DEF void mil_tape_free(mil_tape *tape)
{
    if (!tape) return;
    mil_context *ctx = tape->ctx;
    for (int64_t i = 0; i < tape->workspace_count; i++) mili_backend_release(ctx, tape->workspace[i].memory, tape->workspace[i].bytes);
    mili_free(ctx, tape->workspace, (size_t)tape->workspace_capacity * sizeof *tape->workspace);
    mili_free(ctx, (void *)tape->node, (size_t)tape->capacity * sizeof *tape->node);
    mili_free(ctx, tape->draw, (size_t)tape->draw_capacity * sizeof *tape->draw);
    mili_free(ctx, tape->drawn, (size_t)tape->drawn_capacity * sizeof *tape->drawn);
    mili_free(ctx, tape->update, (size_t)tape->update_capacity * sizeof *tape->update);
    mili_free(ctx, (void *)tape->used, (size_t)tape->used_size * sizeof *tape->used);
    mili_arena_free(ctx, &tape->arena);
    mili_free(ctx, tape, sizeof *tape);
}

MIL_DEF void mil_tape_reset(mil_tape *tape)
{
    if (!tape) return;
    mili_arena_reset(&tape->arena);
    if (tape->used) memset((void *)tape->used, 0, (size_t)tape->used_size * sizeof *tape->used);
    tape->count = tape->ran = tape->draw_count = tape->drawn_count = tape->update_count = tape->updates_ran = tape->used_count = 0;
    tape->backward_done = tape->in_backward = 0;
    tape->layer[0] = 0;
    tape->layer_interned = "";
    tape->scopes = 0;
    tape->status = MIL_OK;
    tape->error[0] = 0;
    tape->plan = NULL;
    tape->workspace_used = 0;
    tape->user_used = 0;
    tape->stream_rows = tape->stream_capacity = 0;
    tape->streamed = NULL;
}

MIL_DEF mil_context *mil_tape_context(mil_tape *tape) { return tape ? tape->ctx : NULL; }

// A constant where training is left out, so that the compiler leaves out draws and dropout too.
#ifdef MIL_NO_TRAINING
#define MILI_IS_TRAINING(tape) ((void)(tape), 0)
#else
#define MILI_IS_TRAINING(tape) ((tape)->training)
#endif
MIL_DEF void mil_tape_training(mil_tape *tape, int on) { if (tape) tape->training = on != 0; }
MIL_DEF int mil_tape_is_training(const mil_tape *tape) { return tape ? MILI_IS_TRAINING(tape) : 0; }
MIL_DEF mil_status mil_tape_status(const mil_tape *tape) { return tape ? mili_tape_report(tape) : MIL_ERROR_ARGUMENT; }
MIL_DEF const char *mil_tape_error(const mil_tape *tape) { return tape ? tape->error : ""; }

MIL_DEF void mil_tape_seed(mil_tape *tape, uint64_t seed, uint64_t step)
{
    if (!tape) return;
    tape->seed = seed;
    tape->step = step;
}

MIL_DEF void mil_tape_set(mil_tape *tape, mil_tape_option option, int value)
{
    if (!tape || (unsigned)option > MIL_TAPE_RECOMPUTE) return;
    if (value) tape->options |= 1u << option;
    else tape->options &= ~(1u << option);
}

MIL_DEF void mil_tape_draw(mil_tape *tape, const char *name, const mil_tensor *values)
{
    if (!tape) return;
    if (!name || !values || !values->data || mil_tensor_count(values) < 0) {
        mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "mil_tape_draw: needs a name and values");
        return;
    }
    if (!mili_reserve(tape->ctx, (void **)&tape->draw, &tape->draw_capacity, tape->draw_count + 1, sizeof *tape->draw)) {
        mili_tape_fail_ctx(tape);
        return;
    }
    mili_draw *d = &tape->draw[tape->draw_count];
    d->name = mili_arena_text(tape->ctx, &tape->arena, name);
    d->values = *values;
    if (!d->name) mili_tape_fail_ctx(tape);
    else tape->draw_count++;
}

MIL_DEF void mil_tape_push(mil_tape *tape, const char *layer)
{
    if (!tape || !layer) return;
    const size_t at = strlen(tape->layer);
    if (tape->scopes++ >= MILI_MAX_SCOPES) return;
    tape->layer_start[tape->scopes - 1] = (int)at;
    snprintf(tape->layer + at, sizeof tape->layer - at, at ? ".%s" : "%s", layer);
    tape->layer_interned = NULL;
}

MIL_DEF void mil_tape_pop(mil_tape *tape)
{
    if (!tape || tape->scopes == 0 || --tape->scopes >= MILI_MAX_SCOPES) return;
    tape->layer[tape->layer_start[tape->scopes]] = 0;
    tape->layer_interned = NULL;
}

// ---- recording ----
MIL_DEF mil_spec mil_spec_make(const mil_op *op, mil_kind kind, int rank, const int64_t *shape)
{
    mil_spec s;
    memset(&s, 0, sizeof s);
    s.op = op;
    s.kind = kind;
    s.dtype = MIL_REAL_DTYPE;
    s.rank = rank;
    for (int a = 0; a < rank && a < MIL_MAX_RANK; a++) s.shape[a] = shape[a];
    return s;
}

MILI_FN void mili_run_nothing(const mil_exec *x) { MILI_UNUSED(x); }
static const mil_op mili_op_input = MIL_OP_WHOLE("input", mili_run_nothing, NULL);
static const mil_op mili_op_param = MIL_OP_WHOLE("parameter", mili_run_nothing, NULL);
static const mil_op mili_op_second = { "second result", mili_run_nothing, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
                                       MIL_OP_STOPS_GRADIENT };

// All fields of a node but its links. NULL after an error.
MILI_FN mil_node *mili_node_new(mil_tape *tape, const mil_op *op, mil_kind kind, mil_dtype dtype, int rank, const int64_t *shape)
{
    if (tape->status != MIL_OK) return NULL;
    if (rank < 0 || rank > MIL_MAX_RANK)
        return mil_tape_fail(tape, MIL_ERROR_SHAPE, "%s: rank %d, the most is %d", op->name, rank, MIL_MAX_RANK);
    const int64_t count = mili_shape_count(rank, shape);
    if (count < 0) return mil_tape_fail(tape, MIL_ERROR_SHAPE, "%s: shape %s is negative or too large", op->name, mili_shape_text(rank, shape).s);
    mil_node *n = (mil_node *)mili_arena_alloc(tape->ctx, &tape->arena, sizeof *n);
    mili_plan_node *plan = (mili_plan_node *)mili_arena_alloc(tape->ctx, &tape->arena, sizeof *plan);
    if (!tape->layer_interned) tape->layer_interned = mili_arena_text(tape->ctx, &tape->arena, tape->layer);
    if (!n || !plan || !tape->layer_interned) return mili_tape_fail_ctx(tape);
    if (!mili_reserve(tape->ctx, (void **)&tape->node, &tape->capacity, tape->count + 1, sizeof *tape->node)) return mili_tape_fail_ctx(tape);
    n->op = op;
    n->tape = tape;
    n->kind = kind;
    n->dtype = dtype;
    n->rank = rank;
    for (int a = 0; a < rank; a++) n->shape[a] = shape[a];
    n->count = count;
    n->cols = rank ? shape[rank - 1] : 1;
    n->rows = n->cols ? count / n->cols : mili_shape_count(rank - 1, shape);
    n->outer = 1;
    n->in_rows = n->rows;
    n->plan = plan;
    n->layer = tape->layer_interned;
    n->index = tape->count;
    plan->base = n;
    if (tape->in_backward) n->flags |= MILI_BACKWARD;
    tape->node[tape->count++] = n;
    return n;
}

// Records a node from a spec that is in order, over these inputs.
MILI_FN mil_node *mili_record_over(mil_tape *tape, const mil_spec *spec, mil_node *const *input)
{
    const char *name = spec->op->name;
    mil_node *n = mili_node_new(tape, spec->op, spec->kind, spec->dtype, spec->rank, spec->shape);
    if (!n) return NULL;
    if (spec->kind == MIL_KIND_REDUCE) { n->outer = spec->outer; n->in_rows = spec->in_rows; }
    n->input_count = spec->input_count;
    n->row_inputs = spec->row_inputs;
    memcpy(n->i, spec->i, sizeof n->i);
    memcpy(n->r, spec->r, sizeof n->r);
    n->p = spec->p;
    int wants = 0;
    for (int i = 0; i < spec->input_count; i++) {
        n->input[i] = input[i];
        wants |= (spec->input[i]->flags & MILI_WANTS_GRAD) != 0;
    }
    if (spec->kind == MIL_KIND_VIEW) n->plan->base = n->input[0]->plan->base;
    const int64_t rows = n->outer * n->in_rows;
    for (int i = 0; i < n->input_count; i++)
        if (n->row_inputs >> i & 1 && (rows ? n->input[i]->count % rows : n->input[i]->count) != 0)
            return mil_tape_fail(tape, MIL_ERROR_SHAPE, "%s: input %d %s cannot be cut into %lld x %lld rows (outer x rows)", name, i,
                                 MILI_SHAPE(n->input[i]), (long long)n->outer, (long long)n->in_rows);
    if (wants && n->dtype == MIL_REAL_DTYPE && !(spec->op->flags & MIL_OP_STOPS_GRADIENT)) {
        n->flags |= MILI_WANTS_GRAD;
        if (MILI_IS_TRAINING(tape) && !tape->in_backward && !spec->op->grad)
            return mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "%s: has no gradient, but a parameter stands below it", name);
    }
    return n;
}

// A node to read `in` from: itself, but what an earlier run converted or drew and did not keep is recorded once more. Such a node
// has leaves for inputs, if any, and they are always there.
MILI_FN mil_node *mili_present(mil_tape *tape, mil_node *in)
{
    mil_node *base = in->plan->base, *again = base->plan->present;
    if (base->index >= tape->ran || !(base->op->flags & MILI_OP_SOURCE) || base->flags & MILI_KEPT) return in;
    mil_spec s;
    memset(&s, 0, sizeof s);
    if (!again || again->index < tape->ran) {
        s = mil_spec_make(base->op, base->kind, base->rank, base->shape);
        s.dtype = base->dtype;
        s.input_count = base->input_count;
        for (int i = 0; i < base->input_count; i++) s.input[i] = base->input[i];
        s.row_inputs = base->row_inputs;
        memcpy(s.i, base->i, sizeof s.i);
        memcpy(s.r, base->r, sizeof s.r);
        s.p = base->p;
        again = base->plan->present = mili_record_over(tape, &s, s.input);
    }
    if (in == base || !again) return again;
    s = mil_spec_make(in->op, MIL_KIND_VIEW, in->rank, in->shape);
    s.dtype = in->dtype;
    s.input_count = 1;
    s.input[0] = again;
    return mili_record_over(tape, &s, s.input);
}

// Records a node from a spec as it is.
MILI_FN mil_node *mili_record(mil_tape *tape, const mil_spec *spec)
{
    if (!tape || tape->status != MIL_OK) return NULL;
    if (!spec || !spec->op || !spec->op->name) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "mil_record: no op");
    const char *name = spec->op->name;
    mil_node *input[MIL_MAX_INPUTS];
    if (spec->input_count < 0 || spec->input_count > MIL_MAX_INPUTS)
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: %d inputs, the most is %d", name, spec->input_count, MIL_MAX_INPUTS);
    for (int i = 0; i < spec->input_count; i++) {
        if (!spec->input[i]) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: input %d is NULL", name, i);
        if (spec->input[i]->tape != tape) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: input %d is of another tape", name, i);
        input[i] = mili_present(tape, spec->input[i]);
        if (!input[i]) return NULL;
    }
    return mili_record_over(tape, spec, input);
}

MILI_FN mil_node *mili_either(mil_node *x);
MILI_FN mil_node *mili_as(mil_node *x, mil_dtype dtype);
MILI_FN mil_node *mili_real(mil_node *x);

// The same for ops that know nothing of inputs' dtypes; refuses what an op of one's own is likely to have forgotten.
MIL_DEF mil_node *mil_record(mil_tape *tape, const mil_spec *spec)
{
    if (!tape || tape->status != MIL_OK || !spec || !spec->op || !spec->op->name || spec->input_count < 0 || spec->input_count > MIL_MAX_INPUTS)
        return mili_record(tape, spec);                    // which says what is wrong
    const mil_op *op = spec->op;
    const int by_rows = spec->kind == MIL_KIND_ROWS || spec->kind == MIL_KIND_REDUCE;
    if (spec->kind != MIL_KIND_VIEW && spec->kind != MIL_KIND_WHOLE && !by_rows)
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: kind %d; an op makes a view, rows, a reduction or a whole", op->name, (int)spec->kind);
    if (spec->dtype != MIL_REAL_DTYPE && spec->dtype != MIL_I64)
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: dtype %d; a value is %s or I64", op->name, (int)spec->dtype, mil_dtype_name(MIL_REAL_DTYPE));
    if (spec->kind == MIL_KIND_REDUCE ? !op->state_bytes || !op->begin || !op->step || !op->merge || !op->finish : spec->kind != MIL_KIND_VIEW && !op->run)
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: the op lacks a function that this kind needs", op->name);
    if (spec->kind == MIL_KIND_REDUCE && (spec->outer < 0 || spec->in_rows < 0 || (spec->outer && spec->in_rows > INT64_MAX / 16 / spec->outer)))
        return mil_tape_fail(tape, MIL_ERROR_SHAPE, "%s: %lld reductions of %lld rows", op->name, (long long)spec->outer, (long long)spec->in_rows);
    if (spec->kind == MIL_KIND_VIEW && (spec->input_count != 1 || (spec->input[0] && mili_shape_count(spec->rank, spec->shape) != spec->input[0]->count)))
        return mil_tape_fail(tape, MIL_ERROR_SHAPE, "%s: a view has one input, of as many elements", op->name);
    if (by_rows && spec->input_count > 0 && spec->row_inputs == 0 && !(spec->op->flags & MIL_OP_WHOLE_INPUTS))
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: row_inputs is 0, though rows are computed from %d inputs: set bit i for an "
                             "input i that is cut into rows (or MIL_OP_WHOLE_INPUTS when none is)", spec->op->name, spec->input_count);
    if (spec->row_inputs >> spec->input_count != 0)
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: row_inputs %#x names an input beyond the last of %d", spec->op->name,
                             spec->row_inputs, spec->input_count);
    mil_spec s = *spec;
    for (int i = 0; i < s.input_count; i++)
        if (s.input[i] && s.input[i]->tape == tape && s.input[i]->op == &mili_op_input) {
            s.input[i] = mili_either(s.input[i]);
            if (!s.input[i]) return NULL;
        }
    return mili_record(tape, &s);
}

MIL_DEF void mil_node_keep(mil_node *node) { if (node) node->flags |= MILI_KEEP; }

MIL_DEF int mil_wants_grad(const mil_node *x) { return x && (x->flags & MILI_WANTS_GRAD); }

MIL_DEF mil_node *mil_node_second(mil_node *n, mil_dtype dtype, int rank, const int64_t *shape)
{
    if (!n) return NULL;
    if (n->second) return mil_tape_fail(n->tape, MIL_ERROR_STATE, "mil_node_second: %s has one already", n->op->name);
    if (n->index < n->tape->ran) return mil_tape_fail(n->tape, MIL_ERROR_STATE, "mil_node_second: %s has run", n->op->name);
    if (n->kind == MIL_KIND_LEAF || n->kind == MIL_KIND_VIEW) return mil_tape_fail(n->tape, MIL_ERROR_ARGUMENT, "mil_node_second: %s computes nothing", n->op->name);
    if (dtype != MIL_REAL_DTYPE && dtype != MIL_I64) return mil_tape_fail(n->tape, MIL_ERROR_ARGUMENT, "mil_node_second: of %s, a value is %s or I64", mil_dtype_name(dtype), mil_dtype_name(MIL_REAL_DTYPE));
    mil_node *s = mili_node_new(n->tape, &mili_op_second, n->kind, dtype, rank, shape);
    if (!s) return NULL;
    if (n->kind == MIL_KIND_ROWS && s->rows != n->rows)
        return mil_tape_fail(n->tape, MIL_ERROR_SHAPE, "mil_node_second: %s makes rows of %s, the second result is %s", n->op->name, MILI_SHAPE(n), MILI_SHAPE(s));
    s->input_count = 1;                                    // so that needing it means needing n
    s->input[0] = n;
    n->second = s;
    return s;
}

// ---- leaves ----
MIL_DEF mil_node *mil_input(mil_tape *tape, const char *name, const mil_tensor *t)
{
    if (!tape || tape->status != MIL_OK) return NULL;
    const char *label = name ? name : "input";
    if (!t) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: no tensor", label);
    if (mil_tensor_count(t) < 0) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: the tensor has no valid dtype, rank or shape", label);
    if (!t->data && mil_tensor_count(t) > 0) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: the tensor's data is NULL", label);
    mil_node *n = mili_node_new(tape, &mili_op_input, MIL_KIND_LEAF, t->dtype, t->rank, t->shape);
    if (!n) return NULL;
    mil_tensor *copy = (mil_tensor *)mili_arena_alloc(tape->ctx, &tape->arena, sizeof *copy);
    if (!copy) return mili_tape_fail_ctx(tape);
    *copy = *t;
    n->p = copy;
    return n;
}

MILI_FN mil_tensor *mili_input_tensor(const mil_node *input)
{
    union { const void *c; void *m; } u;                   // the copy was made by mil_input; only its `data` changes
    u.c = input->p;
    return (mil_tensor *)u.m;
}

// Whether ops can read the input where it stands.
MILI_FN int mili_input_direct(const mil_node *n)
{
    const mil_tensor *t = (const mil_tensor *)n->p;
    const size_t align = t->dtype == MIL_I64 ? sizeof(int64_t) : sizeof(mil_real);
    return (t->dtype == MIL_REAL_DTYPE || t->dtype == MIL_I64) && mili_tensor_packed(t) && (uintptr_t)t->data % align == 0;
}

MIL_DEF mil_status mil_input_set(mil_node *input, const void *data)
{
    if (!input) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = input->tape->ctx;
    mili_enter(ctx);
    if (input->op != &mili_op_input) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_input_set: not an input but %s", input->op->name);
    const int direct = mili_input_direct(input);
    mil_tensor *t = mili_input_tensor(input);
    void *old = t->data;
    memcpy(&t->data, &data, sizeof data);
    if ((!data && input->count > 0) || (direct && !mili_input_direct(input))) {
        t->data = old;
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_input_set: data is %s", data ? "less aligned than before" : "NULL");
    }
    return MIL_OK;
}

MIL_DEF mil_node *mil_use(mil_tape *tape, mil_param *param)
{
    if (!tape || tape->status != MIL_OK) return NULL;
    if (!param) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "mil_use: param is NULL");
    if (2 * (tape->used_count + 1) > tape->used_size) {                     // grow and rehash
        const int64_t size = tape->used_size ? 2 * tape->used_size : 64;
        mil_node **table = (mil_node **)mili_alloc_zero(tape->ctx, (size_t)size * sizeof *table);
        if (!table) return mili_tape_fail_ctx(tape);
        for (int64_t i = 0; i < tape->used_size; i++) {
            if (!tape->used[i]) continue;
            uint64_t at = mili_mix((uint64_t)(uintptr_t)tape->used[i]->p) & (uint64_t)(size - 1);
            while (table[at]) at = (at + 1) & (uint64_t)(size - 1);
            table[at] = tape->used[i];
        }
        mili_free(tape->ctx, (void *)tape->used, (size_t)tape->used_size * sizeof *tape->used);
        tape->used = table;
        tape->used_size = size;
    }
    uint64_t at = mili_mix((uint64_t)(uintptr_t)param) & (uint64_t)(tape->used_size - 1);
    for (; tape->used[at]; at = (at + 1) & (uint64_t)(tape->used_size - 1))
        if (tape->used[at]->p == param) return tape->used[at];
    mil_node *n = mili_node_new(tape, &mili_op_param, MIL_KIND_LEAF, param->dtype, param->rank, param->shape);
    if (!n) return NULL;
    n->p = param;
    if (param->trainable && !param->frozen) n->flags |= MILI_WANTS_GRAD;
    tape->used[at] = n;
    tape->used_count++;
    return n;
}

MILI_FN mil_param *mili_node_param(const mil_node *n)
{
    union { const void *c; void *m; } u;                   // a leaf made by mil_use, whose param is not const
    u.c = n->p;
    return (mil_param *)u.m;
}

MIL_DEF void mil_update(mil_param *param, mil_node *value)
{
    if (!value) return;
    mil_tape *tape = value->tape;
    if (tape->status != MIL_OK) return;
    if (!param) { mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "mil_update: param is NULL"); return; }
    if (param->count != value->count) {
        mil_tape_fail(tape, MIL_ERROR_SHAPE, "mil_update: %s %s cannot take a value %s", param->key, mili_shape_text(param->rank, param->shape).s, MILI_SHAPE(value));
        return;
    }
    value = mili_as(value, param->dtype);                  // an input of another dtype, or strided, is converted
    if (!value) return;
    if (value->plan->base->op == &mili_op_param) {         // a parameter's value is copied now: it may be updated, too
        if (value->dtype != MIL_REAL_DTYPE) { mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "mil_update: %s from another parameter of %s", param->key, mil_dtype_name(value->dtype)); return; }
        value = mil_affine(value, 1, 0);
    }
    if (!value) return;
    if (!mili_reserve(tape->ctx, (void **)&tape->update, &tape->update_capacity, tape->update_count + 1, sizeof *tape->update)) {
        mili_tape_fail_ctx(tape);
        return;
    }
    tape->update[tape->update_count].param = param;
    tape->update[tape->update_count++].value = value;
}

// ---- gradients are recorded ----
#ifndef MIL_NO_TRAINING
MIL_DEF void mil_node_want_grad(mil_node *input)
{
    if (!input || mil_wants_grad(input)) return;
    const mil_tape *tape = input->tape;
    for (int64_t i = input->index + 1; i < tape->count; i++)
        for (int j = 0; j < tape->node[i]->input_count; j++)
            if (tape->node[i]->input[j] == input) { mil_tape_fail(input->tape, MIL_ERROR_STATE, "mil_node_want_grad: %s reads it already", tape->node[i]->op->name); return; }
    input->flags |= MILI_WANTS_GRAD;
}
MIL_DEF mil_node *mil_node_grad(mil_node *x) { return x ? x->grad : NULL; }

MIL_DEF void mil_add_grad(mil_node *x, mil_node *dx)
{
    if (!x || !dx || !mil_wants_grad(x)) return;
    if (!(dx = mili_real(dx))) return;
    if (x->rank != dx->rank || memcmp(x->shape, dx->shape, (size_t)x->rank * sizeof *x->shape) != 0) {
        mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "gradient of %s %s came as %s", x->op->name, MILI_SHAPE(x), MILI_SHAPE(dx));
        return;
    }
    x->grad = x->grad ? mil_add(x->grad, dx) : dx;
}

// Walks back from each node that has a gradient. Nodes recorded meanwhile lie beyond `end` and are not walked.
MILI_FN mil_status mili_backward_walk(mil_tape *tape)
{
    const int64_t end = tape->count;
    char scope[sizeof tape->layer];                        // the caller's, put back below
    memcpy(scope, tape->layer, sizeof scope);
    tape->in_backward = 1;
    for (int64_t i = end - 1; i >= 0 && tape->status == MIL_OK; i--) {
        mil_node *n = tape->node[i];
        if (!n->grad || !(n->flags & MILI_WANTS_GRAD) || n->kind == MIL_KIND_LEAF || n->flags & MILI_BACKWARD) continue;
        snprintf(tape->layer, sizeof tape->layer, "%s", n->layer);
        tape->layer_interned = n->layer;
        if (n->op->grad) n->op->grad(n, n->grad);
        else mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "%s: has no gradient", n->op->name);
    }
    tape->in_backward = 0;
    memcpy(tape->layer, scope, sizeof scope);
    tape->layer_interned = NULL;
    return mili_tape_report(tape);
}

MIL_DEF mil_status mil_tape_backward(mil_tape *tape, mil_node *loss)
{
    if (!tape) return MIL_ERROR_ARGUMENT;
    if (tape->status != MIL_OK) return mili_tape_report(tape);
    if (!loss || loss->tape != tape) mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "mil_tape_backward: no loss on this tape");
    else if (loss->count != 1) mil_tape_fail(tape, MIL_ERROR_SHAPE, "mil_tape_backward: the loss is one number, this is %s", MILI_SHAPE(loss));
    else if (tape->backward_done) mil_tape_fail(tape, MIL_ERROR_STATE, "mil_tape_backward: once per tape");
    else {
        tape->backward_done = 1;
        tape->in_backward = 1;
        if (mil_wants_grad(loss)) loss->grad = mil_constant(tape, loss->rank, loss->shape, 1);
        mili_backward_walk(tape);
    }
    return mili_tape_report(tape);
}

MIL_DEF mil_status mil_tape_backward_from(mil_tape *tape, mil_node *const *y, mil_node *const *dy, int count)
{
    if (!tape) return MIL_ERROR_ARGUMENT;
    if (tape->status != MIL_OK) return mili_tape_report(tape);
    if (tape->backward_done) mil_tape_fail(tape, MIL_ERROR_STATE, "mil_tape_backward_from: once per tape");
    tape->backward_done = 1;
    tape->in_backward = 1;
    if (count > 0 && (!y || !dy)) mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "mil_tape_backward_from: no results or no cotangents");
    for (int i = 0; i < count && tape->status == MIL_OK; i++) {
        if (!y[i] || !dy[i] || y[i]->tape != tape || dy[i]->tape != tape)
            mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "mil_tape_backward_from: result or cotangent %d is not on this tape", i);
        else mil_add_grad(y[i], dy[i]);
    }
    return mili_backward_walk(tape);
}
#endif

// ==== >>plan: stages, row groups, buffers =========================================================================
//
// Before a run the needed nodes are sorted into steps, and each value is given a place.
//
// Row groups. Most of a MIL model is row-wise over the instances (embed, gate, score) and ends in reductions over rows
// (attention pooling, weight gradients). All ROWS and REDUCE nodes over the same number of rows that need nothing of each
// other but rows form a group, and a group is run tile by tile: 128 rows go through all of its nodes before the next 128
// are touched. A value that only its own group reads never exists whole; it lives in a tile, which stays in cache.
//
// Stages. stage(n) is the earliest stage at which n can run: a row node stands in the same stage as the row nodes it reads
// row by row, and one stage after anything that must be complete first (a reduction, or rows that are read whole). Within a
// stage the WHOLE nodes run first, then one group per row count. ABMIL's training step thus has two large groups: the forward
// pass up to the pooling, and everything behind it.
//
// Reductions keep one state per partition; tile t belongs to partition t mod 16, and partitions are merged in order. So sums
// do not depend on threads, and a stream that does not know N yet gives the bits of a whole bag. Reductions with a large
// result (weight gradients) would need 16 large states; they are deferred instead: run over a wave of 4096 rows at a time,
// parallel over the result, rows in order.
//
// Copies. A row value that a later group reads would have to be stored for all rows. Constants and converted inputs are computed
// again there instead, tile by tile, as are light ops (element by element, random draws) of values that are stored anyway;
// under MIL_TAPE_RECOMPUTE all row values are, so that memory does not grow with the rows. Copies run the same kernels on the
// same rows, so nothing changes in the results.
//
// Places. Whole values share one workspace: two values may overlap when they never live at the same time.

enum { MILI_TILE_ROWS = 128, MILI_PARTITIONS = 16, MILI_WAVE_ROWS = 4096, MILI_DEFERRED_STATE = 65536, MILI_TILE_BYTES = 4 << 20 };
enum { MILI_PLACE_NONE, MILI_PLACE_OUTSIDE, MILI_PLACE_FULL, MILI_PLACE_TILE, MILI_PLACE_WAVE };

typedef struct mili_step {
    mil_node  **node;                                      // one WHOLE node, or a group's nodes in the order of recording
    int         count;
    int         group;                                     // 1: ROWS and REDUCE nodes, by tiles
    int64_t     rows, tile_rows, wave_rows;
    int         partitions;
    size_t      slot_offset, slot_bytes, scratch_bytes;    // a slot: tiles, then scratch
} mili_step;

struct mili_plan {
    mili_plan  *next;                                      // of the next run of the same tape
    mili_step  *step;
    int         step_count;
    int         slots;
    size_t      bytes;                                     // of workspace
    int64_t     begin, end;                                // nodes recorded for this run
    int64_t     update_begin, update_end;
    struct mili_plan_node *copies;                         // nodes that run again in a later group
    int64_t     copy_count;
    int         run;                                       // its workspace
    char       *memory;
};

// A piece of memory that is taken from step `first` to step `last`.
typedef struct mili_span { size_t bytes; size_t *offset; int first, last; } mili_span;

// Sizes beyond this are not added up any further, so that no sum of two wraps.
#define MILI_MOST_BYTES (SIZE_MAX / 2 - 64)
MILI_INLINE size_t mili_times(size_t a, size_t b)
{
    size_t product;
    return mili_mul_size(a, b, &product) && product < MILI_MOST_BYTES ? product : MILI_MOST_BYTES;
}

typedef struct mili_gap { size_t begin, end; } mili_gap;    // free memory

// The many small spans of a tape with thousands of nodes, above `base`: step by step, each into the tightest gap that is free
// then. A span looks at the free gaps, of which there are few as a rule, instead of at all that live at the same time. `list` is
// sorted by size.
MILI_FN size_t mili_pack_in_turn(mil_tape *tape, const mili_span *span, const int *list, int count, size_t base)
{
    int steps = 0, gaps = 0, ended = 0;
    size_t top = base;
    for (int i = 0; i < count; i++) steps = MILI_MAX(steps, span[list[i]].last + 1);
    int *turn = (int *)mili_arena_alloc(tape->ctx, &tape->arena, (size_t)(2 * count + 2 * (steps + 1)) * sizeof *turn);
    mili_gap *gap = (mili_gap *)mili_arena_alloc(tape->ctx, &tape->arena, ((size_t)count + 1) * sizeof *gap);
    if (!turn || !gap) return SIZE_MAX;
    int *end = turn + count, *at_turn = end + count, *at_end = at_turn + steps + 1;          // two counting sorts: by first and by last step
    for (int i = 0; i < count; i++) { at_turn[span[list[i]].first + 1]++; at_end[span[list[i]].last + 1]++; }
    for (int k = 0; k < steps; k++) { at_turn[k + 1] += at_turn[k]; at_end[k + 1] += at_end[k]; }
    for (int i = 0; i < count; i++) { turn[at_turn[span[list[i]].first]++] = list[i]; end[at_end[span[list[i]].last]++] = list[i]; }
    for (int i = 0; i < count; i++) {
        const mili_span *s = &span[turn[i]];
        for (; ended < count && span[end[ended]].last < s->first; ended++) {                 // what has ended becomes a gap
            const size_t begin = *span[end[ended]].offset, stop = begin + span[end[ended]].bytes;
            int k = gaps;
            while (k > 0 && gap[k - 1].begin > begin) k--;
            if (k > 0 && gap[k - 1].end == begin) {
                gap[k - 1].end = stop;
                if (k == gaps || gap[k].begin != stop) continue;
                gap[k - 1].end = gap[k].end;
                memmove(gap + k, gap + k + 1, (size_t)(--gaps - k) * sizeof *gap);
            } else if (k < gaps && gap[k].begin == stop) gap[k].begin = begin;
            else {
                memmove(gap + k + 1, gap + k, (size_t)(gaps++ - k) * sizeof *gap);
                gap[k].begin = begin;
                gap[k].end = stop;
            }
        }
        int best = -1;
        for (int k = 0; k < gaps; k++) {
            const size_t size = gap[k].end - gap[k].begin;
            if (size >= s->bytes && (best < 0 || size < gap[best].end - gap[best].begin)) best = k;
        }
        if (best < 0 && gaps && gap[gaps - 1].end == top) gap[best = gaps - 1].end = MILI_MAX(top, gap[gaps - 1].begin + s->bytes);
        *s->offset = best < 0 ? top : gap[best].begin;
        top = MILI_MAX(top, *s->offset + s->bytes);
        if (top > MILI_MOST_BYTES) return SIZE_MAX;
        if (best < 0) continue;
        gap[best].begin += s->bytes;
        if (gap[best].begin == gap[best].end) memmove(gap + best, gap + best + 1, (size_t)(--gaps - best) * sizeof *gap);
    }
    return top;
}

// Gives each span an offset such that spans that live at the same time do not overlap. Largest first, each at the lowest
// place that is free throughout its life. Returns the total, or SIZE_MAX after an error.
enum { MILI_PACK_LARGEST = 1024 };
MILI_FN size_t mili_pack_spans(mil_tape *tape, mili_span *span, int count, int share)
{
    size_t total = 0;
    if (count == 0) return 0;
    const mili_arena_mark mark = mili_arena_here(&tape->arena);
    int *order = (int *)mili_arena_alloc(tape->ctx, &tape->arena, (size_t)count * 2 * sizeof *order);
    if (!order) return SIZE_MAX;
    int *placed = order + count;                           // by offset
    for (int i = 0; i < count; i++) order[i] = i;
    for (int gap = count / 2; gap > 0; gap /= 2)           // Shell's sort, ties by position
        for (int i = gap; i < count; i++) {
            const int o = order[i];
            int j = i;
            for (; j >= gap; j -= gap) {
                const int p = order[j - gap];
                if (span[p].bytes > span[o].bytes || (span[p].bytes == span[o].bytes && p < o)) break;
                order[j] = p;
            }
            order[j] = o;
        }
    const int exact = share ? MILI_MIN(count, MILI_PACK_LARGEST) : 0;
    int n = 0;
    for (int i = 0; i < exact && total != SIZE_MAX; i++) {
        mili_span *s = &span[order[i]];
        size_t at = 0;
        for (int j = 0; j < n; j++) {
            const mili_span *p = &span[placed[j]];
            if (p->last < s->first || s->last < p->first) continue;
            if (*p->offset >= at + s->bytes) break;        // a gap before p is large enough
            at = MILI_MAX(at, *p->offset + p->bytes);
        }
        *s->offset = at;
        total = MILI_MAX(total, at + s->bytes);
        if (total > MILI_MOST_BYTES) total = SIZE_MAX;
        int j = n++;
        for (; j > 0 && *span[placed[j - 1]].offset > at; j--) placed[j] = placed[j - 1];
        placed[j] = order[i];
    }
    if (share && exact < count && total != SIZE_MAX) total = mili_pack_in_turn(tape, span, order + exact, count - exact, total);
    for (int i = 0; i < count && !share && total != SIZE_MAX; i++) {
        *span[i].offset = total;
        total += span[i].bytes;
        if (total > MILI_MOST_BYTES) total = SIZE_MAX;
    }
    mili_arena_release(&tape->arena, mark);
    if (total == SIZE_MAX) mili_fail(tape->ctx, MIL_ERROR_NO_MEMORY, "the tape needs more memory than has addresses");
    return total;
}

MILI_INLINE size_t mili_align_up(size_t bytes) { return (bytes + MILI_ALIGN - 1) / MILI_ALIGN * MILI_ALIGN; }
MILI_INLINE const mil_node *mili_main(const mil_node *n) { return n->op == &mili_op_second ? n->input[0] : n; }

// Rows of one pass over n: the row space that decides its group. 0: not a row node.
MILI_FN int64_t mili_row_space(const mil_node *n)
{
    const mil_node *m = mili_main(n);
    if (m->kind == MIL_KIND_ROWS) return m->rows;
    if (m->kind == MIL_KIND_REDUCE && m->outer == 1) return m->in_rows;
    return 0;
}

// Elements of one row of input i as n reads it.
MILI_FN int64_t mili_input_row(const mil_node *n, int i)
{
    const int64_t rows = n->outer * n->in_rows;
    return rows ? n->input[i]->count / rows : 0;
}

// Whether c reads input i row by row, so that both can stand in one group.
MILI_FN int mili_reads_rows(const mil_node *c, int i)
{
    const mil_node *in = c->input[i], *base = in->plan->base;
    if (!(c->row_inputs >> i & 1) || mili_row_space(c) == 0) return 0;
    if (mili_main(base)->kind != MIL_KIND_ROWS || base->rows != c->in_rows || in->rows != c->in_rows) return 0;
    return in->count / MILI_MAX(c->in_rows, 1) == in->cols;
}

MILI_FN size_t mili_row_bytes(const mil_node *n) { return (size_t)n->cols * mil_dtype_size(n->dtype); }
MILI_FN size_t mili_node_bytes(const mil_node *n) { return (size_t)n->count * mil_dtype_size(n->dtype); }

// ---- what is needed, and when it can run ----
// Whether a value has not run yet or was kept when it ran.
MILI_FN int mili_still_there(mil_tape *tape, const mil_node *n)
{
    const mil_node *base = n->plan->base;
    if (base->index >= tape->ran || base->kind == MIL_KIND_LEAF || base->flags & MILI_KEPT) return 1;
    mil_tape_fail(tape, MIL_ERROR_STATE, "%s %s: of an earlier run and not kept; keep it before that run", base->op->name, MILI_SHAPE(base));
    return 0;
}

MILI_FN mil_status mili_mark_needed(mil_tape *tape)
{
    for (int64_t i = tape->ran; i < tape->count; i++) {
        mil_node *n = tape->node[i], *base = n->plan->base;
        n->flags &= ~(unsigned)MILI_NEEDED;
        if (n->flags & MILI_KEEP && base->kind != MIL_KIND_LEAF && base->index >= tape->ran) base->flags |= MILI_KEEP;     // what a view shows
    }
    for (int64_t i = tape->ran; i < tape->count; i++) {
        mil_node *n = tape->node[i];
        // A later run may want the gradient of what is kept: its second result, which has no other handle, is kept with it.
        if (n->op == &mili_op_second && n->input[0]->flags & MILI_KEEP) n->flags |= MILI_KEEP;
        if (n->flags & MILI_KEEP) n->flags |= MILI_NEEDED;
    }
    for (int64_t i = tape->updates_ran; i < tape->update_count; i++) {
        tape->update[i].value->flags |= MILI_NEEDED;
        tape->update[i].value->plan->base->flags |= MILI_NEEDED;
        if (!mili_still_there(tape, tape->update[i].value)) return tape->status;
    }
    for (int64_t i = tape->count - 1; i >= tape->ran; i--) {
        mil_node *n = tape->node[i];
        if (!(n->flags & MILI_NEEDED)) continue;
        for (int j = 0; j < n->input_count; j++) {
            mil_node *in = n->input[j];
            in->flags |= MILI_NEEDED;
            in->plan->base->flags |= MILI_NEEDED;
            if (!mili_still_there(tape, in)) return tape->status;
        }
    }
    return MIL_OK;
}

// Whether the node takes part in the run itself (views, leaves and second results have no kernel call of their own).
MILI_FN int mili_runs(const mil_node *n)
{
    return (n->flags & MILI_NEEDED) && n->kind != MIL_KIND_LEAF && n->kind != MIL_KIND_VIEW && n->op != &mili_op_second;
}

// Gives each needed node its stage; returns how many there are. Without groups each node has a stage of its own.
MILI_FN int mili_assign_stages(mil_tape *tape, int groups)
{
    int stages = 1;
    for (int64_t i = tape->ran; i < tape->count; i++) {
        mil_node *n = tape->node[i];
        if (!(n->flags & MILI_NEEDED)) continue;
        const int computes = n->op != &mili_op_second && n->kind != MIL_KIND_VIEW;           // else it is there with its input
        int stage = 0;
        for (int j = 0; j < n->input_count; j++) {
            const mil_node *in = n->input[j]->plan->base;
            if (in->index < tape->ran || in->kind == MIL_KIND_LEAF) continue;
            stage = MILI_MAX(stage, in->plan->stage + (computes && mili_row_space(in) && !mili_reads_rows(n, j)));
        }
        if (computes) n->plan->stage = groups ? stage : (int)(i - tape->ran);
        else {
            const mil_node *in = n->input[0], *base = in->plan->base;
            const int early = base->index < tape->ran || (n->kind == MIL_KIND_VIEW && in->kind == MIL_KIND_LEAF);
            n->plan->stage = early ? 0 : in->plan->stage;
        }
        stages = MILI_MAX(stages, n->plan->stage + 1);
        n->plan->latest = INT_MAX;
    }
    if (!groups || tape->stream_capacity) return stages;
    // What reads no computed value could run at once, but then would be stored until it is read: it runs as late as it can.
    for (int64_t i = tape->ran; i < tape->count; i++) {
        const mil_node *n = tape->node[i];
        if (!(n->flags & MILI_NEEDED) || !mili_runs(n)) continue;
        for (int j = 0; j < n->input_count; j++) {
            mili_plan_node *p = n->input[j]->plan->base->plan;
            if (p->base->op->flags & MILI_OP_SOURCE) p->latest = MILI_MIN(p->latest, n->plan->stage - !mili_reads_rows(n, j));
        }
    }
    for (int64_t i = tape->ran; i < tape->count; i++) {
        mili_plan_node *p = tape->node[i]->plan;
        if (p->latest != INT_MAX && p->latest > p->stage) p->stage = p->latest;
    }
    return stages;
}

// The plan's steps: in each stage a step per node that needs whole values, then a group per row space.
MILI_FN mil_status mili_make_steps(mil_tape *tape, mili_plan *plan, int stages)
{
    mil_context *ctx = tape->ctx;
    int64_t nodes = 0;
    for (int64_t i = tape->ran; i < tape->count; i++) nodes += mili_runs(tape->node[i]);
    plan->step = (mili_step *)mili_arena_alloc(ctx, &tape->arena, (size_t)MILI_MAX(nodes, 1) * sizeof *plan->step);
    mil_node **list = (mil_node **)mili_arena_alloc(ctx, &tape->arena, (size_t)MILI_MAX(nodes, 1) * sizeof *list);
    if (!plan->step || !list) return MIL_ERROR_NO_MEMORY;

    // Nodes by stage, in the order of recording: a counting sort, so that deep models stay linear.
    const mili_arena_mark mark = mili_arena_here(&tape->arena);
    int64_t *start = (int64_t *)mili_arena_alloc(ctx, &tape->arena, (size_t)(stages + 1) * sizeof *start);
    mil_node **sorted = (mil_node **)mili_arena_alloc(ctx, &tape->arena, (size_t)MILI_MAX(nodes, 1) * sizeof *sorted);
    if (!start || !sorted) return MIL_ERROR_NO_MEMORY;
    for (int64_t i = tape->ran; i < tape->count; i++)
        if (mili_runs(tape->node[i])) start[tape->node[i]->plan->stage + 1]++;
    for (int s = 0; s < stages; s++) start[s + 1] += start[s];
    for (int64_t i = tape->ran; i < tape->count; i++)
        if (mili_runs(tape->node[i])) sorted[start[tape->node[i]->plan->stage]++] = tape->node[i];
    for (int s = stages; s > 0; s--) start[s] = start[s - 1];
    start[0] = 0;

    for (int s = 0; s < stages; s++) {
        for (int64_t i = start[s]; i < start[s + 1]; i++) {                  // what needs whole values
            if (mili_row_space(sorted[i]) > 0 && !ctx->backend) continue;
            mili_step *step = &plan->step[plan->step_count++];
            step->node = list;
            step->count = 1;
            *list++ = sorted[i];
            sorted[i]->plan->listed = 1;
        }
        for (int64_t i = start[s]; i < start[s + 1]; i++) {                  // then a group per row space
            if (sorted[i]->plan->listed) continue;
            const int64_t rows = mili_row_space(sorted[i]);
            mili_step *step = &plan->step[plan->step_count++];
            step->node = list;
            step->group = 1;
            step->rows = rows;
            for (int64_t j = i; j < start[s + 1]; j++) {
                if (sorted[j]->plan->listed || mili_row_space(sorted[j]) != rows) continue;
                *list++ = sorted[j];
                step->count++;
                sorted[j]->plan->listed = 1;
            }
        }
    }
    mili_arena_release(&tape->arena, mark);
    return MIL_OK;
}

// Fewer rows a tile where rows are wide. From the group as recorded: copies must not change how its sums are split.
MILI_FN void mili_size_tiles(mili_plan *plan)
{
    for (int s = 0; s < plan->step_count; s++) {
        mili_step *step = &plan->step[s];
        size_t row = 0;
        for (int k = 0; k < step->count; k++) {
            row = MILI_MIN(row + MILI_MIN(mili_row_bytes(step->node[k]), MILI_MOST_BYTES), MILI_MOST_BYTES);
            step->node[k]->plan->step = s;
        }
        step->tile_rows = MILI_TILE_ROWS;
        step->partitions = MILI_PARTITIONS;
        while (step->tile_rows > 8 && row > MILI_TILE_BYTES / (size_t)step->tile_rows) step->tile_rows /= 2;
    }
}

// ---- copies ----
// Values that must exist whole whatever is copied: read after the run, or read otherwise than row by row.
MILI_FN void mili_mark_stored(mil_tape *tape, const mili_plan *plan)
{
    for (int64_t i = tape->ran; i < tape->count; i++) {
        mil_node *n = tape->node[i];
        n->plan->stored = n->plan->uses = n->plan->copy_step = n->plan->later = n->plan->again = 0;
        n->plan->copy = NULL;
    }
    for (int64_t i = tape->ran; i < tape->count; i++) {
        const mil_node *n = tape->node[i];
        if (!(n->flags & MILI_NEEDED)) continue;
        if (n->flags & MILI_KEEP) n->plan->base->plan->stored = 1;
        if (!mili_runs(n)) continue;
        for (int j = 0; j < n->input_count; j++) {
            mili_plan_node *p = n->input[j]->plan->base->plan;
            if (!mili_reads_rows(n, j)) p->stored = 1;
            else if (mili_main(p->base)->plan->step == n->plan->step) mili_main(p->base)->plan->uses++;      // in its own group
            else p->later = 1;
        }
    }
    for (int64_t i = plan->update_begin; i < plan->update_end; i++) tape->update[i].value->plan->base->plan->stored = 1;
    // A light node is computed again where that needs nothing stored that would not be stored anyway.
    for (int64_t i = tape->ran; i < tape->count; i++) {
        mil_node *n = tape->node[i];
        if (!mili_runs(n) || n->kind != MIL_KIND_ROWS || !(n->op->flags & MILI_OP_LIGHT)) continue;
        if (n->plan->stored || n->second || n->rows <= MILI_TILE_ROWS) continue;
        int again = 1;
        for (int j = 0; j < n->input_count; j++) {
            const mil_node *in = n->input[j]->plan->base;
            if (in->kind == MIL_KIND_LEAF || in->index < tape->ran || !(n->row_inputs >> j & 1)) continue;
            again &= mili_reads_rows(n, j) && (in->plan->stored || in->plan->later || in->plan->again || in->op->flags & MILI_OP_CHEAP);
        }
        n->plan->again = again;
    }
}

// The node whose copy n in step s reads in place of its input j; NULL when it reads what was stored.
MILI_FN mil_node *mili_to_copy(const mil_tape *tape, const mil_node *n, int j, int s)
{
    const mil_node *base = n->input[j]->plan->base;
    if (base->index < tape->ran || base->kind == MIL_KIND_LEAF || base->plan->stored || !mili_reads_rows(n, j)) return NULL;
    mil_node *made = base->op == &mili_op_second ? base->input[0] : n->input[j]->plan->base;
    if (made->plan->step >= s) return NULL;
    const int source = made->op->flags & MILI_OP_SOURCE && (made->op->flags & MILI_OP_CHEAP || made->plan->uses == 0);
    const int recompute = tape->options & (1u << MIL_TAPE_RECOMPUTE) && made->rows > MILI_TILE_ROWS;
    return source || made->plan->again || recompute ? made : NULL;
}

// A copy of n for step s. own_plan 1: with a value of its own, among the plan's copies; 0: n itself, but for what it will read.
MILI_FN mil_node *mili_copy_node(mil_tape *tape, mili_plan *plan, const mil_node *n, int s, int own_plan)
{
    mil_node *copy = (mil_node *)mili_arena_alloc(tape->ctx, &tape->arena, sizeof *copy);
    if (!copy) return NULL;
    *copy = *n;
    if (!own_plan) return copy;
    mili_plan_node *p = (mili_plan_node *)mili_arena_alloc(tape->ctx, &tape->arena, sizeof *p);
    if (!p) return NULL;
    p->base = p->node = copy;
    p->step = s;
    p->next_copy = plan->copies;
    plan->copies = p;
    plan->copy_count++;
    copy->plan = p;
    copy->second = NULL;
    copy->flags &= ~(unsigned)(MILI_KEEP | MILI_KEPT);
    return copy;
}

// Points the inputs of n, which runs in step s, to the copies made for s. 0: no memory.
MILI_FN int mili_read_copies(mil_tape *tape, mili_plan *plan, mil_node *n, int s)
{
    for (int j = 0; j < n->input_count; j++) {
        mil_node *in = n->input[j], *base = in->plan->base;
        if (base->plan->copy_step != s + 1 || !mili_reads_rows(n, j)) continue;
        if (in != base && in->plan->copy_step != s + 1) {  // a view: the same view of the copy
            mil_node *view = mili_copy_node(tape, plan, in, s, 1);
            if (!view) return 0;
            view->plan->base = view->input[0] = base->plan->copy;
            in->plan->copy = view;
            in->plan->copy_step = s + 1;
        }
        n->input[j] = in->plan->copy;
    }
    return 1;
}

// Adds to the list what n, in step s, reads of copies.
MILI_FN int mili_list_copies(const mil_tape *tape, const mil_node *n, int s, mil_node **list, int count)
{
    for (int j = 0; j < n->input_count; j++) {
        mil_node *made = mili_to_copy(tape, n, j, s);
        if (!made || made->plan->copy_step == s + 1) continue;
        made->plan->copy_step = s + 1;
        list[count++] = made;
    }
    return count;
}

// Copies into group s what it is to compute again. `list` has room for all nodes of the tape.
MILI_FN int mili_copy_into(mil_tape *tape, mili_plan *plan, int s, mil_node **list)
{
    mili_step *step = &plan->step[s];
    int count = 0;
    for (int k = 0; k < step->count; k++) count = mili_list_copies(tape, step->node[k], s, list, count);
    for (int k = 0; k < count; k++) count = mili_list_copies(tape, list[k], s, list, count);           // and what those read
    if (count == 0) return 1;
    for (int gap = count / 2; gap > 0; gap /= 2)           // in the order of recording
        for (int i = gap; i < count; i++) {
            mil_node *n = list[i];
            int j = i;
            for (; j >= gap && list[j - gap]->index > n->index; j -= gap) list[j] = list[j - gap];
            list[j] = n;
        }
    mil_node **nodes = (mil_node **)mili_arena_alloc(tape->ctx, &tape->arena, (size_t)(count + step->count) * sizeof *nodes);
    if (!nodes) return 0;
    for (int i = 0; i < count; i++) {
        mil_node *copy = mili_copy_node(tape, plan, list[i], s, 1);
        if (!copy) return 0;
        list[i]->plan->copy = copy;
        if (list[i]->second && list[i]->second->flags & MILI_NEEDED) {
            mil_node *second = mili_copy_node(tape, plan, list[i]->second, s, 1);
            if (!second) return 0;
            second->input[0] = copy;
            copy->second = second;
            list[i]->second->plan->copy = second;
            list[i]->second->plan->copy_step = s + 1;
        }
        if (!mili_read_copies(tape, plan, copy, s)) return 0;
        nodes[i] = copy;
    }
    for (int k = 0; k < step->count; k++) {
        int reads = 0;
        mil_node *n = step->node[k];
        for (int j = 0; j < n->input_count; j++) reads |= n->input[j]->plan->base->plan->copy_step == s + 1;
        if (reads) n = mili_copy_node(tape, plan, n, s, 0);            // the node as recorded stays as it is
        if (!n || (reads && !mili_read_copies(tape, plan, n, s))) return 0;
        nodes[count + k] = n;
    }
    step->node = nodes;
    step->count += count;
    return 1;
}

// Takes out of the groups what only copies were read of.
MILI_FN void mili_drop_unread(const mil_tape *tape, mili_plan *plan)
{
    for (int64_t i = tape->ran; i < tape->count; i++) tape->node[i]->plan->uses = 0;
    for (int s = plan->step_count - 1; s >= 0; s--) {
        mili_step *step = &plan->step[s];
        int left = step->count;                            // kept nodes gather at the end
        for (int k = step->count - 1; k >= 0; k--) {
            mil_node *n = step->node[k];
            const int stored = n->plan->stored || (n->second && n->second->plan->stored);
            if (step->group && n->kind == MIL_KIND_ROWS && !stored && n->plan->uses == 0) continue;
            for (int j = 0; j < n->input_count; j++) {
                mil_node *base = n->input[j]->plan->base;
                (base->op == &mili_op_second ? base->input[0] : base)->plan->uses++;
            }
            step->node[--left] = n;
        }
        step->node += left;
        step->count -= left;
    }
}

MILI_FN mil_status mili_make_copies(mil_tape *tape, mili_plan *plan)
{
    mili_mark_stored(tape, plan);
    mil_node **list = (mil_node **)mili_arena_alloc(tape->ctx, &tape->arena, (size_t)(tape->count - tape->ran) * sizeof *list);
    if (!list) return MIL_ERROR_NO_MEMORY;
    for (int s = 0; s < plan->step_count; s++)
        if (plan->step[s].group && !mili_copy_into(tape, plan, s, list)) return MIL_ERROR_NO_MEMORY;
    if (plan->copy_count) mili_drop_unread(tape, plan);
    for (int64_t i = tape->ran; i < tape->count; i++) tape->node[i]->plan->copy_step = 0;
    return MIL_OK;
}

// ---- where values live ----
// Life times, and whether a row value is read by anything but its own group.
MILI_FN void mili_assign_places(mil_tape *tape, mili_plan *plan)
{
    for (int64_t i = tape->ran; i < tape->count; i++) {
        mili_plan_node *p = tape->node[i]->plan;
        p->first = INT_MAX;
        p->last = -1;
        p->place = MILI_PLACE_NONE;
        p->deferred = 0;
    }
    for (int s = 0; s < plan->step_count; s++)
        for (int k = 0; k < plan->step[s].count; k++) {
            mil_node *n = plan->step[s].node[k];
            mil_node *const made[2] = { n, n->second && (n->second->flags & MILI_NEEDED) ? n->second : NULL };
            for (int m = 0; m < 2; m++) {
                if (!made[m]) continue;
                made[m]->plan->first = made[m]->plan->last = s;
                made[m]->plan->place = plan->step[s].group && n->kind == MIL_KIND_ROWS ? MILI_PLACE_TILE : MILI_PLACE_FULL;
            }
            n->plan->deferred = n->kind == MIL_KIND_REDUCE && plan->step[s].group && n->op->flags & MIL_OP_WAVES &&
                                n->op->state_bytes(n) > MILI_DEFERRED_STATE;
        }
    for (int s = 0; s < plan->step_count; s++)
        for (int k = 0; k < plan->step[s].count; k++) {
            mil_node *n = plan->step[s].node[k];
            for (int j = 0; j < n->input_count; j++) {
                mil_node *base = n->input[j]->plan->base;
                mili_plan_node *p = base->plan;
                if (base->index < tape->ran || base->kind == MIL_KIND_LEAF) continue;
                p->last = MILI_MAX(p->last, s);
                if (p->place == MILI_PLACE_FULL) continue;
                if (p->first != s || !mili_reads_rows(n, j)) p->place = MILI_PLACE_FULL;
                else if (n->plan->deferred) p->place = MILI_PLACE_WAVE;
            }
        }
    for (int64_t i = tape->ran; i < tape->count; i++) {
        mil_node *n = tape->node[i], *base = n->plan->base;
        if (!(n->flags & MILI_NEEDED) || base->kind == MIL_KIND_LEAF || base->index < tape->ran) continue;
        if (!(n->flags & MILI_KEEP)) continue;
        base->flags |= MILI_KEEP | MILI_KEPT;
        base->plan->place = MILI_PLACE_FULL;
        base->plan->last = plan->step_count;
    }
    for (int64_t i = plan->update_begin; i < plan->update_end; i++) {
        mil_node *base = tape->update[i].value->plan->base;
        if (base->kind == MIL_KIND_LEAF) continue;
        base->plan->place = MILI_PLACE_FULL;
        base->plan->last = plan->step_count;
    }
    if (tape->options & (1u << MIL_TAPE_NO_REUSE))
        for (int64_t i = tape->ran; i < tape->count; i++)
            if (tape->node[i]->plan->place != MILI_PLACE_NONE) tape->node[i]->plan->place = MILI_PLACE_FULL;
}

// The layout of one slot of a group: its tiles, shared within the group, then scratch.
MILI_FN mil_status mili_plan_slot(mil_tape *tape, mili_step *step, mili_span *span)
{
    step->scratch_bytes = 0;
    step->wave_rows = step->rows;
    for (int k = 0; k < step->count; k++) {
        mil_node *n = step->node[k];
        if (n->op->scratch) step->scratch_bytes = MILI_MAX(step->scratch_bytes, mili_align_up(n->op->scratch(n)));
        if (n->plan->deferred) step->wave_rows = MILI_MIN(step->rows, (int64_t)MILI_WAVE_ROWS);
    }
    for (int k = 0; k < step->count; k++) {                // the last reader of each tile
        step->node[k]->plan->last_reader = k;
        if (step->node[k]->second) step->node[k]->second->plan->last_reader = k;
        for (int i = 0; i < step->node[k]->input_count; i++) step->node[k]->input[i]->plan->base->plan->last_reader = k;
    }
    const int64_t tile_rows = tape->stream_capacity ? step->tile_rows : MILI_MIN(step->tile_rows, step->rows);
    int spans = 0;
    for (int k = 0; k < step->count; k++) {
        for (int m = 0; m < 2; m++) {
            mil_node *n = m ? step->node[k]->second : step->node[k];
            if (!n || n->plan->place != MILI_PLACE_TILE) continue;
            mili_span *s = &span[spans++];
            s->bytes = mili_align_up(mili_times((size_t)tile_rows, mili_row_bytes(n)));
            s->offset = &n->plan->offset;
            s->first = k;
            s->last = n->plan->last_reader;
        }
    }
    const size_t tiles = mili_pack_spans(tape, span, spans, 1);
    if (tiles == SIZE_MAX) return MIL_ERROR_NO_MEMORY;
    step->slot_bytes = tiles + step->scratch_bytes;
    return MIL_OK;
}

MILI_FN void mili_add_span(mili_span *span, int *count, size_t bytes, size_t *offset, int first, int last)
{
    *offset = 0;
    if (bytes == 0) return;
    mili_span *s = &span[(*count)++];
    s->bytes = mili_align_up(MILI_MIN(bytes, MILI_MOST_BYTES));
    s->offset = offset;
    s->first = first;
    s->last = last;
}

// What step s takes of the workspace: its slots, states, prepared weights, and the values that are made in it.
MILI_FN void mili_step_spans(const mil_tape *tape, mili_plan *plan, int s, mili_span *span, int *count)
{
    mili_step *step = &plan->step[s];
    const int streamed = tape->stream_capacity && step->group && step->rows == tape->stream_capacity;
    const int last = streamed ? plan->step_count : s;      // a stream's states stay
    mili_add_span(span, count, mili_times(step->slot_bytes, (size_t)plan->slots), &step->slot_offset, s, last);
    for (int k = 0; k < step->count; k++) {
        mil_node *n = step->node[k];
        mili_plan_node *p = n->plan;
        p->state_bytes = step->group && n->kind == MIL_KIND_REDUCE && !p->deferred ? mili_align_up(n->op->state_bytes(n)) : 0;
        mili_add_span(span, count, mili_times(p->state_bytes, (size_t)step->partitions), &p->state_offset, s, last);
        p->prepared_bytes = step->group && n->op->prepare_bytes ? mili_align_up(n->op->prepare_bytes(n)) : 0;
        mili_add_span(span, count, p->prepared_bytes, &p->prepared_offset, s, last);
        for (int m = 0; m < 2; m++) {
            mil_node *v = m ? n->second : n;
            if (!v || (m && !(v->flags & MILI_NEEDED))) continue;
            if (v->plan->place == MILI_PLACE_FULL) v->plan->bytes = mili_node_bytes(v);
            else if (v->plan->place == MILI_PLACE_WAVE) v->plan->bytes = mili_times((size_t)step->wave_rows, mili_row_bytes(v));
            else continue;
            mili_add_span(span, count, v->plan->bytes ? v->plan->bytes : 1, &v->plan->offset, s, MILI_MAX(v->plan->last, last));
        }
    }
}

// Plans the nodes recorded since the last run. The plan lives in the tape's arena. NULL after an error.
MILI_FN mili_plan *mili_make_plan(mil_tape *tape)
{
    mil_context *ctx = tape->ctx;
    if (mili_mark_needed(tape) != MIL_OK) return NULL;
    mili_plan *plan = (mili_plan *)mili_arena_alloc(ctx, &tape->arena, sizeof *plan);
    if (!plan) return NULL;
    const int groups = !ctx->backend && !(tape->options & (1u << MIL_TAPE_NO_GROUPS));
    plan->slots = ctx->threads;
    plan->begin = tape->ran;
    plan->end = tape->count;
    plan->update_begin = tape->updates_ran;
    plan->update_end = tape->update_count;
    for (int64_t i = tape->ran; i < tape->count; i++) tape->node[i]->plan->listed = 0;
    const int stages = mili_assign_stages(tape, groups);
    if (mili_make_steps(tape, plan, stages) != MIL_OK) return NULL;
    mili_size_tiles(plan);
    if (groups && !tape->stream_capacity && mili_make_copies(tape, plan) != MIL_OK) return NULL;
    mili_assign_places(tape, plan);

    const size_t room = (size_t)(4 * (tape->count - tape->ran + plan->copy_count) + plan->step_count + 1);
    const mili_arena_mark mark = mili_arena_here(&tape->arena);
    mili_span *span = (mili_span *)mili_arena_alloc(ctx, &tape->arena, room * sizeof *span);
    if (!span) return NULL;
    const int end = plan->step_count;
    const int share = !(tape->options & (1u << MIL_TAPE_NO_REUSE)) && !tape->stream_capacity;     // a stream's values all stay
    int count = 0, ok = 1;
    for (int s = 0; s < plan->step_count && ok; s++) {
        mili_step *step = &plan->step[s];
        if (step->group) ok = mili_plan_slot(tape, step, span) == MIL_OK;
        else {
            const mil_node *n = step->node[0];
            step->scratch_bytes = n->op->scratch ? mili_align_up(n->op->scratch(n)) : 0;
            if (n->kind == MIL_KIND_REDUCE) step->scratch_bytes += mili_align_up(n->op->state_bytes(n));
            step->slot_bytes = step->scratch_bytes;
        }
    }
    for (int s = 0; s < plan->step_count && ok; s++) mili_step_spans(tape, plan, s, span, &count);
    if (ok && !mili_host_memory(ctx))                      // inputs are copied to the backend
        for (int64_t i = 0; i < tape->count; i++) {
            mil_node *n = tape->node[i];
            if (n->op != &mili_op_input || !(n->flags & MILI_NEEDED) || (n->plan->home && n->plan->home <= tape->ran)) continue;
            n->plan->home = tape->ran + 1;
            n->plan->bytes = mili_node_bytes(n);
            mili_add_span(span, &count, n->plan->bytes, &n->plan->offset, 0, end);
        }
    MIL_ASSERT((size_t)count <= room);
    plan->bytes = ok ? mili_pack_spans(tape, span, count, share) : SIZE_MAX;
    mili_arena_release(&tape->arena, mark);
    return plan->bytes == SIZE_MAX ? NULL : plan;
}

MIL_DEF size_t mil_tape_bytes(mil_tape *tape)
{
    if (!tape || tape->status != MIL_OK) return 0;
    mili_enter(tape->ctx);
    const mili_arena_mark mark = mili_arena_here(&tape->arena);        // the plan is only looked at: its memory is given back
    const mili_plan *plan = tape->count == tape->ran && tape->update_count == tape->updates_ran ? NULL : mili_make_plan(tape);
    const size_t bytes = plan ? plan->bytes + MILI_ALIGN : 0;
    mili_arena_release(&tape->arena, mark);
    if (tape->status != MIL_OK) mili_tape_report(tape);
    return bytes;
}

MIL_DEF void mil_tape_workspace(mil_tape *tape, void *memory, size_t bytes)
{
    if (!tape) return;
    tape->user_memory = (char *)memory;
    tape->user_bytes = memory ? bytes : 0;
    tape->user_used = 0;
}

// ==== >>execute: the CPU backend, running a tape ==================================================================

typedef struct mili_area { mili_slots *slots; char *memory; size_t bytes; } mili_area;       // scratch, one block per slot

typedef struct mili_parallel_job {
    const mili_area *area;
    void (*task)(void *arg, int64_t index, void *scratch);
    void *arg;
} mili_parallel_job;

MILI_FN void mili_parallel_task(void *arg, int64_t index)
{
    const mili_parallel_job *job = (const mili_parallel_job *)arg;
    const int slot = mili_slot_take(job->area->slots);
    job->task(job->arg, index, job->area->memory + (size_t)slot * job->area->bytes);
    mili_slot_give(job->area->slots, slot);
}

MIL_DEF void mil_exec_parallel(const mil_exec *x, int64_t count, void (*task)(void *arg, int64_t index, void *scratch), void *arg)
{
    mili_parallel_job job;
    job.area = (const mili_area *)x->area;
    job.task = task;
    job.arg = arg;
    mili_parallel(x->ctx, count, mili_parallel_task, &job);
}

// Where the rows of `v` from `row` on stand, when slot memory and the wave's first row are these; v is read by rows or whole.
MILI_FN char *mili_value_at(const mil_node *v, int by_rows, size_t row_bytes, int64_t row, char *slot, int64_t wave)
{
    const mil_node *base = v->plan->base;
    const mili_plan_node *p = base->plan;
    char *at = (char *)base->data;
    if (p->place == MILI_PLACE_TILE && base->kind != MIL_KIND_LEAF) return slot ? slot + p->offset : NULL;
    if (!by_rows || !at) return at;                        // no memory yet: an input that is converted tile by tile
    if (base->kind == MIL_KIND_LEAF)                       // before the first row: for begin and prepare, which read none
        return row < p->row_base ? NULL : at + (size_t)(row - p->row_base) * row_bytes;
    return at + (size_t)(p->place == MILI_PLACE_WAVE ? row - wave : row) * row_bytes;
}

typedef struct mili_frame { mil_exec x; const void *in[MIL_MAX_INPUTS]; } mili_frame;

// An empty value may have no memory; kernels get some address all the same, as memcpy and pointer sums take no NULL.
MILI_FN void *mili_address(mili_frame *f, const mil_node *v, void *at) { return at || v->count ? at : f; }

// Everything a kernel is told, for rows [row, row + rows) of n.
MILI_FN void mili_frame_set(mili_frame *f, mil_context *ctx, const mil_node *n, int64_t row, int64_t rows, char *slot, int64_t wave)
{
    mil_exec *x = &f->x;
    memset(x, 0, sizeof *x);
    x->ctx = ctx;
    x->node = n;
    x->in = f->in;
    x->row = row;
    x->rows = rows;
    x->all_rows = n->in_rows;
    x->kernels = ctx->kernels;
    for (int i = 0; i < n->input_count; i++) {
        const int by_rows = n->row_inputs >> i & 1;
        const size_t row_bytes = by_rows ? (size_t)mili_input_row(n, i) * mil_dtype_size(n->input[i]->dtype) : 0;
        f->in[i] = mili_address(f, n->input[i], mili_value_at(n->input[i], by_rows, row_bytes, row, slot, wave));
    }
    const int out_rows = n->kind == MIL_KIND_ROWS;
    x->out = mili_value_at(n, out_rows, out_rows ? mili_row_bytes(n) : 0, row, slot, wave);
    if (n->second && n->second->plan->place != MILI_PLACE_NONE)
        x->second = mili_value_at(n->second, out_rows, out_rows ? mili_row_bytes(n->second) : 0, row, slot, wave);
    x->prepared = n->plan->prepared;
}

// ---- a group, by tiles ----
// Rows of a stream, in the caller's memory: each task converts and checks the tiles that it works on.
typedef struct mili_rows {
    const mil_node *node;                                  // the input that they are
    const char *data;
    size_t    stride;
    mil_dtype dtype;
    int       direct;                                      // 1: they can be read where they stand
    mil_real *tiles;                                       // else a tile per slot
    int64_t   first;                                       // number of the row at `data`
    int64_t   bad[MILI_PARTITIONS];                        // per partition, the first row that holds NaN or infinity; -1: none
} mili_rows;

typedef struct mili_group {
    mil_tape *tape;
    const mili_step *step;
    char *memory;                                          // workspace
    int64_t begin, end, all_rows;                          // rows of this call; begin is a multiple of the tile
    mili_rows *rows;                                       // NULL: inputs are read whole
    mili_slots slots;
} mili_group;

// Rows [row, row + count), packed and in mil_real. NULL, and `bad` set, when one is not finite.
MILI_FN const mil_real *mili_rows_tile(mili_rows *r, const mili_kernels *K, int64_t row, int64_t count, int64_t tile_rows, int slot,
                                       int64_t partition)
{
    const int64_t cols = r->node->cols;
    const char *from = r->data + (size_t)(row - r->first) * r->stride;
    const mil_real *tile = (const mil_real *)(const void *)from;
    if (!r->direct) {
        mil_real *to = r->tiles + slot * tile_rows * cols;
        for (int64_t i = 0; i < count; i++) mili_convert(K, to + i * cols, from + (size_t)i * r->stride, r->dtype, cols);
        tile = to;
    }
    if (K->finite(tile, count * cols)) return tile;
    for (int64_t i = 0; i < count && r->bad[partition] < 0; i++)
        if (!K->finite(tile + i * cols, cols)) r->bad[partition] = row + i;
    return NULL;
}

MILI_FN void mili_group_task(void *arg, int64_t partition)
{
    mili_group *g = (mili_group *)arg;
    const mili_step *step = g->step;
    mil_context *ctx = g->tape->ctx;
    const int index = mili_slot_take(&g->slots);
    char *slot = g->memory + step->slot_offset + (size_t)index * step->slot_bytes;
    void *scratch = slot + step->slot_bytes - step->scratch_bytes;
    const int64_t tile_rows = step->tile_rows;
    int64_t tile = g->begin / tile_rows;
    tile += (partition - tile % step->partitions + step->partitions) % step->partitions;
    mili_frame f;
    for (; tile * tile_rows < g->end; tile += step->partitions) {
        const int64_t row = tile * tile_rows, rows = MILI_MIN(tile_rows, g->end - row);
        const mil_real *from = NULL;
        if (g->rows) {
            from = mili_rows_tile(g->rows, ctx->kernels, row, rows, tile_rows, index, partition);
            if (!from) continue;
        }
        for (int k = 0; k < step->count; k++) {
            const mil_node *n = step->node[k];
            if (n->plan->deferred) continue;
            mili_frame_set(&f, ctx, n, row, rows, slot, g->begin);
            for (int i = 0; from && i < n->input_count; i++) if (n->input[i]->plan->base == g->rows->node) f.in[i] = from;
            f.x.all_rows = g->all_rows;
            f.x.scratch = scratch;
            if (n->kind == MIL_KIND_ROWS) n->op->run(&f.x);
            else {
                f.x.state = n->plan->state + (size_t)partition * n->plan->state_bytes;
                n->op->step(&f.x);
            }
        }
    }
    mili_slot_give(&g->slots, index);
}

MILI_FN void mili_group_open(mili_group *g, mil_tape *tape, const mili_plan *plan, const mili_step *step, char *memory)
{
    memset(g, 0, sizeof *g);
    g->tape = tape;
    g->step = step;
    g->memory = memory;
    g->slots.count = plan->slots;
    g->all_rows = step->rows;
}

// Before the first rows: packed weights, empty states.
MILI_FN void mili_group_begin(mili_group *g)
{
    const mili_step *step = g->step;
    mili_frame f;
    for (int k = 0; k < step->count; k++) {
        const mil_node *n = step->node[k];
        if (n->plan->prepared_bytes) {
            mili_area area;
            n->plan->prepared = g->memory + n->plan->prepared_offset;
            area.slots = &g->slots;
            area.memory = g->memory + step->slot_offset;
            area.bytes = step->slot_bytes;
            mili_frame_set(&f, g->tape->ctx, n, 0, 0, area.memory, 0);
            f.x.area = &area;
            n->op->prepare(&f.x);
        }
        if (n->kind != MIL_KIND_REDUCE || n->plan->deferred) continue;
        n->plan->state = g->memory + n->plan->state_offset;
        for (int p = 0; p < step->partitions; p++) {
            mili_frame_set(&f, g->tape->ctx, n, 0, 0, NULL, 0);
            f.x.state = n->plan->state + (size_t)p * n->plan->state_bytes;
            n->op->begin(&f.x);
        }
    }
}

// Rows [begin, end), begin a multiple of the tile: wave by wave, the deferred reductions after each wave.
MILI_FN void mili_group_rows(mili_group *g, int64_t begin, int64_t end)
{
    const mili_step *step = g->step;
    const int64_t wave = MILI_MAX(step->wave_rows, step->tile_rows);
    for (int64_t row = begin; row < end; row += wave) {
        g->begin = row;
        g->end = MILI_MIN(end, row + wave);
        const int64_t tiles = (g->end - g->begin + step->tile_rows - 1) / step->tile_rows;
        if (tiles == 1) mili_group_task(g, row / step->tile_rows % step->partitions);
        else mili_parallel(g->tape->ctx, step->partitions, mili_group_task, g);
        for (int k = 0; k < step->count; k++) {
            const mil_node *n = step->node[k];
            if (!n->plan->deferred) continue;
            mili_area area;
            mili_frame f;
            area.slots = &g->slots;
            area.memory = g->memory + step->slot_offset + (step->slot_bytes - step->scratch_bytes);
            area.bytes = step->slot_bytes;
            mili_frame_set(&f, g->tape->ctx, n, row, g->end - row, NULL, row);
            f.x.area = &area;
            n->op->run(&f.x);
        }
    }
}

typedef struct mili_finish_job { mili_group *g; int64_t tiles; } mili_finish_job;

MILI_FN void mili_group_finish_node(void *arg, int64_t index)
{
    const mili_finish_job *job = (const mili_finish_job *)arg;
    const mili_step *step = job->g->step;
    const mil_node *n = step->node[index];
    if (n->kind != MIL_KIND_REDUCE || n->plan->deferred) return;
    mili_frame f;
    mili_frame_set(&f, job->g->tape->ctx, n, 0, job->g->all_rows, NULL, 0);
    f.x.all_rows = job->g->all_rows;
    f.x.state = n->plan->state;
    for (int p = 1; p < step->partitions && p < job->tiles; p++)
        n->op->merge(&f.x, n->plan->state, n->plan->state + (size_t)p * n->plan->state_bytes);
    n->op->finish(&f.x);
}

// After the last row: merges partitions in order and writes the results.
MILI_FN void mili_group_finish(mili_group *g, int64_t rows)
{
    mili_finish_job job;
    job.g = g;
    job.tiles = (rows + g->step->tile_rows - 1) / g->step->tile_rows;
    g->all_rows = rows;
    mili_parallel(g->tape->ctx, g->step->count, mili_group_finish_node, &job);
}

// ---- one node alone ----
typedef struct mili_reduce_job {
    mil_context *ctx;
    const mil_node *n;
    const void *const *in;
    void *out, *second;
    char *states;                                          // one per slot, and scratch behind each
    size_t state_bytes;                                    // of both
    mili_slots *slots;
} mili_reduce_job;

// A reduction that is no part of a group: one state per outer slice, rows in order.
MILI_FN void mili_reduce_slice(void *arg, int64_t outer)
{
    const mili_reduce_job *job = (const mili_reduce_job *)arg;
    const mil_node *n = job->n;
    const int slot = mili_slot_take(job->slots);
    const void *in[MIL_MAX_INPUTS];
    mil_exec x;
    memset(&x, 0, sizeof x);
    x.ctx = job->ctx;
    x.node = n;
    x.in = in;
    x.rows = x.all_rows = n->in_rows;
    x.kernels = job->ctx->kernels;
    x.state = job->states + (size_t)slot * job->state_bytes;
    x.scratch = job->states + (size_t)slot * job->state_bytes + mili_align_up(n->op->state_bytes(n));
    for (int i = 0; i < n->input_count; i++) {
        const size_t slice = n->row_inputs >> i & 1 ? (size_t)(n->input[i]->count / n->outer) * mil_dtype_size(n->input[i]->dtype) : 0;
        in[i] = (const char *)job->in[i] + (size_t)outer * slice;
    }
    x.out = (char *)job->out + (size_t)outer * (mili_node_bytes(n) / (size_t)n->outer);
    if (job->second) x.second = (char *)job->second + (size_t)outer * (mili_node_bytes(n->second) / (size_t)n->outer);
    n->op->begin(&x);
    if (n->in_rows) n->op->step(&x);
    n->op->finish(&x);
    mili_slot_give(job->slots, slot);
}

// Runs n whole: inputs, results and scratch are set in x; area->bytes holds scratch and, for a reduction, its state.
MILI_FN void mili_run_whole(mil_exec *x, const mili_area *area)
{
    const mil_node *n = x->node;
    x->area = area;
    x->scratch = area->memory;
    if (n->kind == MIL_KIND_REDUCE) {
        mili_reduce_job job;
        job.ctx = x->ctx;
        job.n = n;
        job.in = x->in;
        job.out = x->out;
        job.second = x->second;
        job.states = area->memory;
        job.state_bytes = area->bytes;
        job.slots = area->slots;
        if (n->count > 0 && n->outer > 0) mili_parallel(x->ctx, n->outer, mili_reduce_slice, &job);
        return;
    }
    x->row = 0;
    x->rows = x->all_rows = n->in_rows;
    n->op->run(x);
}

MIL_DEF void mil_cpu_run(mil_context *ctx, mil_node *node)
{
    mili_frame f;
    mili_slots slots;
    mili_area area;
    memset(&slots, 0, sizeof slots);
    memset(&f, 0, sizeof f);
    slots.count = ctx->threads;
    size_t scratch = node->op->scratch ? mili_align_up(node->op->scratch(node)) : 0;
    if (node->kind == MIL_KIND_REDUCE) scratch += mili_align_up(node->op->state_bytes(node));
    scratch = MILI_MAX(scratch, MILI_ALIGN);
    char *memory = (char *)mili_alloc(ctx, scratch * (size_t)slots.count);
    const size_t prepared = node->kind == MIL_KIND_ROWS && node->op->prepare_bytes ? node->op->prepare_bytes(node) : 0;
    char *packed = prepared ? (char *)mili_alloc(ctx, prepared) : NULL;
    if (memory && (!prepared || packed)) {
        area.slots = &slots;
        area.memory = memory;
        area.bytes = scratch;
        f.x.ctx = ctx;
        f.x.node = node;
        f.x.in = f.in;
        f.x.kernels = ctx->kernels;
        for (int i = 0; i < node->input_count; i++) f.in[i] = mili_address(&f, node->input[i], node->input[i]->data);
        f.x.out = mili_address(&f, node, node->data);
        f.x.second = node->second ? node->second->data : NULL;
        f.x.area = &area;
        f.x.prepared = packed;
        if (prepared) node->op->prepare(&f.x);
        mili_run_whole(&f.x, &area);
    }
    mili_free(ctx, packed, prepared);
    mili_free(ctx, memory, scratch * (size_t)slots.count);
}

// On another backend: runs there what it supports; the rest on the CPU, over copies unless memory is shared.
MILI_FN mil_status mili_run_on_backend(mil_context *ctx, mil_node *n)
{
    const mil_backend *backend = ctx->backend;
    if (backend->supports(ctx->backend_self, n)) {
        if (backend->run(ctx->backend_self, ctx, &n, 1) == MIL_OK) return MIL_OK;
        return mili_fail(ctx, MIL_ERROR_BACKEND, "backend %s: %s %s failed", backend->name, n->op->name, MILI_SHAPE(n));
    }
    ctx->fallbacks++;
    if (backend->host_memory) { mil_cpu_run(ctx, n); return ctx->status; }
    mil_node *value[MIL_MAX_INPUTS + 2];
    void *there[MIL_MAX_INPUTS + 2], *here[MIL_MAX_INPUTS + 2];
    int count = 0, ok = 1;
    for (int i = 0; i < n->input_count + 2; i++) {
        mil_node *v = i < n->input_count ? n->input[i] : i == n->input_count ? n : n->second;
        int seen = v == NULL || v->data == NULL;
        for (int j = 0; j < count; j++) seen |= value[j] == v;
        if (seen) continue;
        value[count] = v;
        there[count] = v->data;
        here[count] = mili_alloc(ctx, mili_node_bytes(v));
        ok &= here[count] != NULL || mili_node_bytes(v) == 0;
        count++;
    }
    backend->synchronize(ctx->backend_self);
    for (int i = 0; i < count && ok; i++) {
        if (value[i] != n && value[i] != n->second) ok = mili_download(ctx, here[i], there[i], mili_node_bytes(value[i])) == MIL_OK;
        value[i]->data = here[i];
    }
    if (ok) mil_cpu_run(ctx, n);
    for (int i = 0; i < count; i++) {
        value[i]->data = there[i];
        if (ok && (value[i] == n || value[i] == n->second)) ok = mili_upload(ctx, there[i], here[i], mili_node_bytes(value[i])) == MIL_OK;
        mili_free(ctx, here[i], mili_node_bytes(value[i]));
    }
    return ctx->status;
}

// ---- a run ----
// To the backend's memory, packed.
MILI_FN mil_status mili_upload_input(mil_context *ctx, mil_node *n)
{
    const mil_tensor *t = (const mil_tensor *)n->p;
    if (mili_tensor_packed(t)) return mili_upload(ctx, n->data, t->data, mili_node_bytes(n));
    const size_t bytes = mili_node_bytes(n), size = mil_dtype_size(t->dtype);
    char *packed = (char *)mili_alloc(ctx, bytes);
    if (!packed) return bytes ? ctx->status : MIL_OK;
    for (int64_t i = 0; i < n->count; i++) {
        const char *src = (const char *)t->data;
        int64_t at = i;
        for (int a = t->rank - 1; a >= 0; a--) { src += at % t->shape[a] * t->stride[a]; at /= t->shape[a]; }
        memcpy(packed + (size_t)i * size, src, size);
    }
    mili_upload(ctx, n->data, packed, bytes);
    mili_free(ctx, packed, bytes);
    return ctx->status;
}

// Points every node to its memory.
MILI_FN mil_status mili_bind(mil_tape *tape, mili_plan *plan)
{
    mil_context *ctx = tape->ctx;
    for (int64_t i = 0; i < plan->end; i++) {
        mil_node *n = tape->node[i];
        if (!(n->flags & MILI_NEEDED)) continue;
        if (n->op == &mili_op_param) n->data = mili_node_param(n)->data;
        else if (n->op == &mili_op_input) {
            if (mili_host_memory(ctx)) n->data = mili_input_tensor(n)->data;
            else if (n->plan->home == plan->begin + 1) {
                n->data = plan->memory + n->plan->offset;
                if (mili_upload_input(ctx, n) != MIL_OK) return ctx->status;
            }
        } else if (n->kind == MIL_KIND_VIEW) n->data = n->plan->base->data;
        else if (i >= plan->begin) {
            const int place = n->plan->place;
            n->data = place == MILI_PLACE_FULL || place == MILI_PLACE_WAVE ? plan->memory + n->plan->offset : NULL;
        }
    }
    for (mili_plan_node *p = plan->copies; p; p = p->next_copy) p->node->data = p->place == MILI_PLACE_WAVE ? plan->memory + p->offset : NULL;
    return MIL_OK;
}

MILI_FN void mili_poison_dead(mil_tape *tape, const mili_plan *plan, int step_index)
{
    const mili_step *step = &plan->step[step_index];
    if (!mili_host_memory(tape->ctx)) return;
    for (int64_t i = plan->begin; i < plan->end; i++) {
        const mil_node *n = tape->node[i];
        const mili_plan_node *p = n->plan;
        if (!(n->flags & MILI_NEEDED) || n->kind == MIL_KIND_VIEW || n->kind == MIL_KIND_LEAF) continue;
        if ((p->place == MILI_PLACE_FULL || p->place == MILI_PLACE_WAVE) && p->last == step_index) memset(plan->memory + p->offset, 0xff, p->bytes);
    }
    if (step->slot_bytes) memset(plan->memory + step->slot_offset, 0xff, step->slot_bytes * (size_t)plan->slots);
}

MILI_FN mil_status mili_run_step(mil_tape *tape, mili_plan *plan, mili_step *step)
{
    mil_context *ctx = tape->ctx;
    if (ctx->backend) return mili_run_on_backend(ctx, step->node[0]);
    if (step->count == 0) return MIL_OK;                   // all of it runs elsewhere
    if (step->group) {
        mili_group g;
        const int64_t rows = tape->stream_capacity && step->rows == tape->stream_capacity ? tape->stream_rows : step->rows;
        mili_group_open(&g, tape, plan, step, plan->memory);
        g.all_rows = rows;
        mili_group_begin(&g);
        mili_group_rows(&g, 0, rows);
        mili_group_finish(&g, rows);
        return ctx->status;
    }
    mili_frame f;
    mili_slots slots;
    mili_area area;
    memset(&slots, 0, sizeof slots);
    slots.count = plan->slots;
    area.slots = &slots;
    area.memory = plan->memory + step->slot_offset;
    area.bytes = step->slot_bytes;
    mili_frame_set(&f, ctx, step->node[0], 0, step->node[0]->in_rows, NULL, 0);
    mili_run_whole(&f.x, &area);
    return ctx->status;
}

MILI_FN mil_status mili_apply_updates(mil_tape *tape, const mili_plan *plan)
{
    for (int64_t i = plan->update_begin; i < plan->update_end; i++) {
        const mili_update *u = &tape->update[i];
        mil_context *ctx = tape->ctx;
        if (mili_host_memory(ctx)) memmove(u->param->data, u->value->data, mili_node_bytes(u->value));
        else {
            void *copy = mili_alloc(ctx, mili_node_bytes(u->value));
            if (!copy) return ctx->status;
            if (mili_download(ctx, copy, u->value->data, mili_node_bytes(u->value)) == MIL_OK)
                mili_upload(ctx, u->param->data, copy, mili_node_bytes(u->value));
            mili_free(ctx, copy, mili_node_bytes(u->value));
        }
        u->param->version++;
    }
    return tape->ctx->status;
}

// Everything but the updates: parameters are as before.
MILI_FN mil_status mili_run_steps(mil_tape *tape, mili_plan *plan)
{
    mil_context *ctx = tape->ctx;
    if (tape->options & (1u << MIL_TAPE_POISON) && mili_host_memory(ctx) && plan->bytes) memset(plan->memory, 0xff, plan->bytes);
    if (mili_bind(tape, plan) != MIL_OK) return ctx->status;
    for (int s = 0; s < plan->step_count; s++) {
        if (mili_run_step(tape, plan, &plan->step[s]) != MIL_OK) return ctx->status;
        if (tape->options & (1u << MIL_TAPE_POISON)) mili_poison_dead(tape, plan, s);
    }
    return MIL_OK;
}

MILI_FN mil_status mili_run_plan(mil_tape *tape, mili_plan *plan)
{
    return mili_run_steps(tape, plan) == MIL_OK ? mili_apply_updates(tape, plan) : tape->ctx->status;
}

// A block of `bytes` for this run: the caller's, or one kept from an earlier recording, or a new one.
MILI_FN char *mili_take_workspace(mil_tape *tape, size_t bytes)
{
    mil_context *ctx = tape->ctx;
    if (tape->user_memory) {
        const size_t gap = (MILI_ALIGN - (size_t)((uintptr_t)(tape->user_memory + tape->user_used) % MILI_ALIGN)) % MILI_ALIGN;
        if (tape->user_bytes - tape->user_used < gap || tape->user_bytes - tape->user_used - gap < bytes) {
            mili_fail(ctx, MIL_ERROR_NO_MEMORY, "the caller's workspace of %llu bytes is too small: %llu are needed",
                      (unsigned long long)tape->user_bytes, (unsigned long long)(tape->user_used + gap + bytes));
            return NULL;
        }
        char *at = tape->user_memory + tape->user_used + gap;
        tape->user_used += gap + bytes;
        return at;
    }
    if (!mili_reserve(ctx, (void **)&tape->workspace, &tape->workspace_capacity, tape->workspace_used + 1, sizeof *tape->workspace)) return NULL;
    if (tape->workspace_used == tape->workspace_count) {
        tape->workspace[tape->workspace_count].memory = NULL;
        tape->workspace[tape->workspace_count++].bytes = 0;
    }
    mili_workspace *w = &tape->workspace[tape->workspace_used];
    if (w->bytes < bytes || !w->memory) {
        mili_backend_release(ctx, w->memory, w->bytes);
        w->bytes = 0;
        w->memory = (char *)mili_backend_alloc(ctx, MILI_MAX(bytes, MILI_ALIGN));
        if (!w->memory) return NULL;
        w->bytes = MILI_MAX(bytes, MILI_ALIGN);
    }
    tape->workspace_used++;
    return w->memory;
}

// Plans what is new and gives it memory. *out NULL when nothing is new.
MILI_FN mil_status mili_plan_run(mil_tape *tape, mili_plan **out)
{
    *out = NULL;
    if (tape->count == tape->ran && tape->update_count == tape->updates_ran) return MIL_OK;
    mili_plan *plan = mili_make_plan(tape);
    if (!plan) {
        if (tape->status != MIL_OK) mili_fail(tape->ctx, tape->status, "%s", tape->error);
        return tape->ctx->status;
    }
    plan->memory = mili_take_workspace(tape, plan->bytes);
    if (!plan->memory) return tape->ctx->status;
    *out = plan;
    return MIL_OK;
}

// The plan has run: its nodes are of the past.
MILI_FN void mili_plan_done(mil_tape *tape, mili_plan *plan)
{
    mili_plan **last = &tape->plan;
    while (*last) last = &(*last)->next;
    *last = plan;
    tape->ran = plan->end;
    tape->updates_ran = plan->update_end;
}

MIL_DEF mil_status mil_tape_run(mil_tape *tape)
{
    mili_plan *plan;
    const size_t user_used = tape ? tape->user_used : 0;
    if (mil_tape_status(tape) != MIL_OK || mili_plan_run(tape, &plan) != MIL_OK) return tape ? tape->ctx->status : MIL_ERROR_ARGUMENT;
    if (!plan) return MIL_OK;
    if (mili_run_plan(tape, plan) == MIL_OK) mili_plan_done(tape, plan);
    else if (tape->user_memory) tape->user_used = user_used;
    else tape->workspace_used--;
    return tape->ctx->status;
}

MIL_DEF mil_status mil_tape_rerun(mil_tape *tape)
{
    const mil_status status = mil_tape_status(tape);
    if (status != MIL_OK) return status;
    if (!tape->plan) return mili_fail(tape->ctx, MIL_ERROR_STATE, "mil_tape_rerun: nothing has run yet");
    for (mili_plan *plan = tape->plan; plan; plan = plan->next)
        if (mili_run_plan(tape, plan) != MIL_OK) break;
    return tape->ctx->status;
}

MIL_DEF mil_status mil_node_read(mil_node *node, void *dst, int64_t count)
{
    if (!node) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = node->tape->ctx;
    mili_enter(ctx);
    const mil_node *base = node->plan->base;
    if (!dst) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_node_read: dst is NULL");
    if (count != node->count)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_node_read: %s %s has %lld elements, not %lld", node->op->name, MILI_SHAPE(node),
                         (long long)node->count, (long long)count);
    if (base->kind != MIL_KIND_LEAF && base->index < node->tape->ran && !(base->flags & MILI_KEPT))
        return mili_fail(ctx, MIL_ERROR_STATE, "mil_node_read: %s %s was not kept (mil_node_keep before the run)", node->op->name, MILI_SHAPE(node));
    if (base->kind != MIL_KIND_LEAF && base->index >= node->tape->ran)
        return mili_fail(ctx, MIL_ERROR_STATE, "mil_node_read: %s %s has not run", node->op->name, MILI_SHAPE(node));
    if (ctx->backend) ctx->backend->synchronize(ctx->backend_self);
    const void *src = base->data;
    if (base->op == &mili_op_param) src = mili_node_param(base)->data;
    if (base->op == &mili_op_input) {                      // of any dtype and strides
        const mil_tensor *t = (const mil_tensor *)base->p;
        mili_convert_rows(ctx->kernels, t, t->data, 0, base->rows, base->dtype == MIL_I64 ? MIL_I64 : MIL_REAL_DTYPE, dst);
        return MIL_OK;
    }
    return mili_download(ctx, dst, src, mili_node_bytes(node));
}

// ==== >>op-table: every op: shape rule, kernel, gradient ==========================================================
//
// Each op stands in one place: the public function checks shapes and records; the kernel computes a block of rows, a
// reduction step or everything; the gradient records other ops. MILI_OPS at the end lists them all. A node's attributes i[0], i[1],
// ... and r[0], ... mean what the comment above its op says: axes, transposes, slopes.

// MILI_GRAD(f): an op's gradient in its table row; there is none without training.
#ifdef MIL_NO_TRAINING
#define MILI_GRAD(f) NULL
#else
#define MILI_GRAD(f) f
#endif
#define MILI_ROWS_OP(name, run, grad) MIL_OP_ROWS(name, run, MILI_GRAD(grad))
#define MILI_LIGHT_OP(name, run, grad) { name, run, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, MILI_GRAD(grad), MILI_OP_LIGHT }
#define MILI_WHOLE_OP(name, run, grad) MILI_ROWS_OP(name, run, grad)
#define MILI_REDUCE_OP(name, state, begin, step, merge, finish, grad) \
    MIL_OP_REDUCE(name, state, begin, step, merge, finish, MILI_GRAD(grad))

#define MILI_K(x) ((const mili_kernels *)(x)->kernels)
#define MILI_IN(x, i) ((const mil_real *)(x)->in[i])
#define MILI_IN_INDEX(x, i) ((const int64_t *)(x)->in[i])
#define MILI_OUT(x) ((mil_real *)(x)->out)

// The number of an axis counted from the front, or -1 with an error.
MILI_FN int mili_axis(const mil_node *x, int axis, const char *op)
{
    const int a = axis < 0 ? axis + x->rank : axis;
    if (a >= 0 && a < x->rank) return a;
    mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "%s: axis %d of %s", op, axis, MILI_SHAPE(x));
    return -1;
}

// Any tensor as [outer, n, inner] around axis a.
typedef struct mili_around { int64_t outer, n, inner; } mili_around;

MILI_FN mili_around mili_around_axis(const mil_node *x, int a)
{
    mili_around r;
    r.outer = mili_shape_count(a, x->shape);
    r.n = x->shape[a];
    r.inner = mili_shape_count(x->rank - a - 1, x->shape + a + 1);
    return r;
}

// Whether both inputs are there. A NULL usually is an earlier error, which the tape has; a caller's own NULL becomes one.
MILI_FN int mili_have(const mil_node *a, const mil_node *b, const char *op)
{
    if (a && b) return 1;
    if (a || b) mil_tape_fail(a ? a->tape : b->tape, MIL_ERROR_ARGUMENT, "%s: an input is NULL", op);
    return 0;
}

MILI_FN int mili_same_shape(const mil_node *a, const mil_node *b)
{
    if (a->rank != b->rank) return 0;
    for (int i = 0; i < a->rank; i++) if (a->shape[i] != b->shape[i]) return 0;
    return 1;
}

// Tasks over x itself, which take a plain pointer and only read it.
MILI_FN void mili_tasks(const mil_exec *x, int64_t count, void (*task)(void *arg, int64_t index, void *scratch))
{
    union { const mil_exec *c; void *m; } u;
    u.c = x;
    mil_exec_parallel(x, count, task, u.m);
}

// A copy loop over `count` pieces, split among threads in pieces of about 64 K elements.
typedef struct mili_loop { const mil_exec *x; int64_t count, chunk; void (*body)(const mil_exec *x, int64_t begin, int64_t end); } mili_loop;

MILI_FN void mili_loop_task(void *arg, int64_t index, void *scratch)
{
    const mili_loop *loop = (const mili_loop *)arg;
    MILI_UNUSED(scratch);
    const int64_t begin = index * loop->chunk;
    loop->body(loop->x, begin, MILI_MIN(begin + loop->chunk, loop->count));
}

MILI_FN void mili_for(const mil_exec *x, int64_t count, int64_t cost, void (*body)(const mil_exec *x, int64_t begin, int64_t end))
{
    mili_loop loop;
    loop.x = x;
    loop.count = count;
    loop.chunk = MILI_MAX(1, 65536 / MILI_MAX(cost, 1));
    loop.body = body;
    mil_exec_parallel(x, (count + loop.chunk - 1) / loop.chunk, mili_loop_task, &loop);
}

// ---- convert: inputs of other dtypes or strides ----
// Rows of an input leaf, read where they stand. Without gradient: an input that wants one must be packed mil_real.
MILI_FN void mili_convert_run(const mil_exec *x)
{
    const mil_node *n = x->node, *leaf = n->input[0];
    mil_tensor t = *(const mil_tensor *)leaf->p;
    if (!mili_host_memory(x->ctx)) memset(t.stride, 0, sizeof t.stride);      // packed when it was uploaded
    mili_convert_rows(MILI_K(x), &t, x->in[0], x->row - leaf->plan->row_base, x->rows, n->dtype, x->out);
}
static const mil_op mili_op_convert = { "convert", mili_convert_run, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, MILI_OP_SOURCE | MILI_OP_CHEAP };

MILI_FN mil_node *mili_as(mil_node *x, mil_dtype dtype)
{
    if (!x) return NULL;
    if (x->op != &mili_op_input) {
        if (x->dtype == dtype) return x;
        return mil_tape_fail(x->tape, MIL_ERROR_ARGUMENT, "%s %s holds %s where %s is needed", x->op->name, MILI_SHAPE(x),
                             mil_dtype_name(x->dtype), mil_dtype_name(dtype));
    }
    if (x->dtype == dtype && mili_input_direct(x)) return x;
    mil_node **converted = &x->plan->converted[dtype == MIL_I64];
    if (!*converted) {
        mil_spec s = mil_spec_make(&mili_op_convert, MIL_KIND_ROWS, x->rank, x->shape);
        s.dtype = dtype;
        s.input_count = 1;
        s.input[0] = x;
        if (x->flags & MILI_WANTS_GRAD)
            return mil_tape_fail(x->tape, MIL_ERROR_UNSUPPORTED, "an input that wants a gradient must be packed %s", mil_dtype_name(MIL_REAL_DTYPE));
        *converted = mili_record(x->tape, &s);
    }
    return *converted ? mili_present(x->tape, *converted) : NULL;
}
MILI_FN mil_node *mili_real(mil_node *x) { return mili_as(x, MIL_REAL_DTYPE); }
MILI_FN mil_node *mili_index(mil_node *x) { return mili_as(x, MIL_I64); }
MILI_FN mil_node *mili_either(mil_node *x) { return mili_as(x, x && x->dtype == MIL_I64 ? MIL_I64 : MIL_REAL_DTYPE); }   // for ops that only move elements

// ---- constant ----
MILI_FN void mili_constant_run(const mil_exec *x)
{
    const mil_real value = (mil_real)x->node->r[0];
    for (int64_t i = 0; i < x->rows * x->node->cols; i++) MILI_OUT(x)[i] = value;
}
static const mil_op mili_op_constant = { "constant", mili_constant_run, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, MILI_OP_SOURCE | MILI_OP_CHEAP };

MIL_DEF mil_node *mil_constant(mil_tape *tape, int rank, const int64_t *shape, double value)
{
    if (!tape) return NULL;
    mil_spec s = mil_spec_make(&mili_op_constant, MIL_KIND_ROWS, MILI_MIN(rank, MIL_MAX_RANK), shape);
    s.rank = rank;
    s.r[0] = value;
    return mil_record(tape, &s);
}

// ---- element by element, one input ----
// X(name, text): the ops of MIL_UNARY_LIST, then those with numbers of their own; the text is not used here.
#define MILI_UNARY_EXTRA(X) X(leaky_relu, "") X(clamp, "") X(affine, "")
#define MILI_UNARY_ENUM(name, text) MILI_UNARY_##name,
typedef enum mili_unary_kind { MIL_UNARY_LIST(MILI_UNARY_ENUM) MILI_UNARY_EXTRA(MILI_UNARY_ENUM) MILI_UNARY_COUNT } mili_unary_kind;
#undef MILI_UNARY_ENUM

#define MILI_EACH(expression) for (int64_t i = 0; i < n; i++) { const mil_real v = a[i]; y[i] = (expression); }

MILI_FN void mili_unary_run(const mil_exec *x)
{
    const mili_kernels *K = MILI_K(x);
    const int64_t n = x->rows * x->node->cols;
    const mil_real *a = MILI_IN(x, 0), p = (mil_real)x->node->r[0], q = (mil_real)x->node->r[1];
    mil_real *y = MILI_OUT(x);
    switch ((mili_unary_kind)x->node->i[0]) {
    case MILI_UNARY_exp:        K->exp(y, a, n); break;
    case MILI_UNARY_log:        MILI_EACH(mili_log(v)); break;
    case MILI_UNARY_sqrt:       MILI_EACH(mili_sqrt(v)); break;
    case MILI_UNARY_square:     MILI_EACH(v * v); break;
    case MILI_UNARY_abs:        MILI_EACH(mili_fabs(v)); break;
    case MILI_UNARY_reciprocal: MILI_EACH(1 / v); break;
    case MILI_UNARY_tanh:       K->tanh(y, a, n); break;
    case MILI_UNARY_sigmoid:    K->sigmoid(y, a, n); break;
    case MILI_UNARY_relu:       K->relu(y, a, n); break;
    case MILI_UNARY_gelu:       K->gelu(y, a, n); break;
    case MILI_UNARY_silu:       K->silu(y, a, n); break;
    case MILI_UNARY_softplus:   MILI_EACH((v > 0 ? v : 0) + mili_log1p(mili_exp(-mili_fabs(v)))); break;
    case MILI_UNARY_leaky_relu: MILI_EACH(v > 0 ? v : p * v); break;
    case MILI_UNARY_clamp:      MILI_EACH(v < p ? p : v > q ? q : v); break;
    case MILI_UNARY_affine:     K->scale(y, a, p, q, n); break;
    case MILI_UNARY_COUNT:      break;
    }
}

#ifndef MIL_NO_TRAINING
// Ops whose derivative is a function of the result; the others keep x.
MILI_FN int mili_unary_uses_result(int64_t kind)
{
    return kind == MILI_UNARY_exp || kind == MILI_UNARY_sqrt || kind == MILI_UNARY_reciprocal || kind == MILI_UNARY_tanh ||
           kind == MILI_UNARY_sigmoid || kind == MILI_UNARY_relu;
}

#define MILI_EACH_GRAD(expression) for (int64_t i = 0; i < n; i++) { const mil_real v = a[i]; y[i] = d[i] * (expression); }

// dx = dy f'(v), v = y or x as above.
MILI_FN void mili_unary_grad_run(const mil_exec *x)
{
    const int64_t n = x->rows * x->node->cols;
    const mili_kernels *K = MILI_K(x);
    const mil_real *a = MILI_IN(x, 0), *d = MILI_IN(x, 1), p = (mil_real)x->node->r[0], q = (mil_real)x->node->r[1];
    mil_real *y = MILI_OUT(x);
    switch ((mili_unary_kind)x->node->i[0]) {
    case MILI_UNARY_exp:        MILI_EACH_GRAD(v); break;
    case MILI_UNARY_log:        MILI_EACH_GRAD(1 / v); break;
    case MILI_UNARY_sqrt:       MILI_EACH_GRAD((mil_real)0.5 / v); break;
    case MILI_UNARY_square:     MILI_EACH_GRAD(2 * v); break;
    case MILI_UNARY_abs:        MILI_EACH_GRAD((mil_real)((v > 0) - (v < 0))); break;
    case MILI_UNARY_reciprocal: MILI_EACH_GRAD(-v * v); break;
    case MILI_UNARY_tanh:       K->tanh_grad(y, a, d, n); break;
    case MILI_UNARY_sigmoid:    K->sigmoid_grad(y, a, d, n); break;
    case MILI_UNARY_relu:       K->relu_grad(y, a, d, n); break;
    case MILI_UNARY_gelu:       K->gelu_grad(y, a, n); K->mul(y, y, d, n); break;
    case MILI_UNARY_silu:       K->silu_grad(y, a, n); K->mul(y, y, d, n); break;
    case MILI_UNARY_softplus:   K->sigmoid(y, a, n); K->mul(y, y, d, n); break;
    case MILI_UNARY_leaky_relu: MILI_EACH_GRAD(v > 0 ? 1 : p); break;
    case MILI_UNARY_clamp:      MILI_EACH_GRAD((mil_real)(v >= p && v <= q)); break;
    case MILI_UNARY_affine:     K->scale(y, d, p, 0, n); break;
    case MILI_UNARY_COUNT:      break;
    }
}
static const mil_op mili_op_unary_grad = MILI_ROWS_OP("gradient of an elementwise op", mili_unary_grad_run, NULL);

MILI_FN void mili_unary_grad(mil_node *n, mil_node *dy)
{
    mil_spec s = mil_spec_make(&mili_op_unary_grad, MIL_KIND_ROWS, n->rank, n->shape);
    const int64_t kind = n->i[0];
    s.input_count = 2;
    s.input[0] = mili_unary_uses_result(kind) ? n : n->input[0];
    s.input[1] = dy;
    s.row_inputs = 3;
    s.i[0] = kind;
    s.r[0] = n->r[0];
    s.r[1] = n->r[1];
    mil_add_grad(n->input[0], kind == MILI_UNARY_affine ? mil_affine(dy, n->r[0], 0) : mil_record(n->tape, &s));
}
#endif

#define MILI_UNARY_ROW(name, text) MILI_LIGHT_OP(#name, mili_unary_run, mili_unary_grad),
static const mil_op mili_unary_ops[] = { MIL_UNARY_LIST(MILI_UNARY_ROW) MILI_UNARY_EXTRA(MILI_UNARY_ROW) };
#undef MILI_UNARY_ROW

MILI_FN mil_node *mili_unary(mil_node *x, mili_unary_kind kind, double p, double q)
{
    x = mili_real(x);
    if (!x) return NULL;
    mil_spec s = mil_spec_make(&mili_unary_ops[kind], MIL_KIND_ROWS, x->rank, x->shape);
    s.input_count = 1;
    s.input[0] = x;
    s.row_inputs = 1;
    s.i[0] = kind;
    s.r[0] = p;
    s.r[1] = q;
    return mil_record(x->tape, &s);
}

#define MILI_UNARY_DEFINE(name, text) MIL_DEF mil_node *mil_##name(mil_node *x) { return mili_unary(x, MILI_UNARY_##name, 0, 0); }
MIL_UNARY_LIST(MILI_UNARY_DEFINE)
#undef MILI_UNARY_DEFINE
MIL_DEF mil_node *mil_leaky_relu(mil_node *x, double slope) { return mili_unary(x, MILI_UNARY_leaky_relu, slope, 0); }
MIL_DEF mil_node *mil_clamp(mil_node *x, double low, double high) { return mili_unary(x, MILI_UNARY_clamp, low, high); }
MIL_DEF mil_node *mil_affine(mil_node *x, double scale, double shift) { return mili_unary(x, MILI_UNARY_affine, scale, shift); }

// ---- element by element, two inputs, broadcast ----
// mask_fill: a where b is not 0, else r[0].  weights: exp(a - b), the softmax whose log-sum-exp is b; 0 where b is -inf.
// drop: a / (1 - r[0]) where the draw b is at least r[0], else 0.  broadcast: a alone, repeated to the result's shape.
#define MILI_BINARY_LIST(X) X(add) X(sub) X(mul) X(div) X(maximum) X(minimum) X(mask_fill) X(weights) X(drop) X(broadcast)
#define MILI_BINARY_ENUM(name) MILI_BINARY_##name,
typedef enum mili_binary_kind { MILI_BINARY_LIST(MILI_BINARY_ENUM) MILI_BINARY_COUNT } mili_binary_kind;
#undef MILI_BINARY_ENUM

#define MILI_PAIRS(expression) \
    for (int64_t i = 0; i < n; i++) { const mil_real v = a[i * sa], w = b[i * sb]; y[i] = (expression); MILI_UNUSED(w); }

// y [n] from a and b whose steps are 1, or 0 for one element repeated.
MILI_FN void mili_binary_span(const mili_kernels *K, int64_t kind, double param, mil_real *y, const mil_real *a, int64_t sa, const mil_real *b, int64_t sb, int64_t n)
{
    const mil_real p = (mil_real)param;
    if (sa == 1 && sb == 1) {
        switch ((mili_binary_kind)kind) {
        case MILI_BINARY_add: K->add(y, a, b, n); return;
        case MILI_BINARY_sub: K->sub(y, a, b, n); return;
        case MILI_BINARY_mul: K->mul(y, a, b, n); return;
        case MILI_BINARY_div: K->div(y, a, b, n); return;
#ifndef MIL_NO_TRAINING
        case MILI_BINARY_drop: K->drop(y, a, b, p, n); return;
#endif
        default: break;
        }
    }
    switch ((mili_binary_kind)kind) {
    case MILI_BINARY_add:       MILI_PAIRS(v + w); break;
    case MILI_BINARY_sub:       MILI_PAIRS(v - w); break;
    case MILI_BINARY_mul:       MILI_PAIRS(v * w); break;
    case MILI_BINARY_div:       MILI_PAIRS(v / w); break;
    case MILI_BINARY_maximum:   MILI_PAIRS(v >= w || mili_is_nan(v) ? v : w); break;
    case MILI_BINARY_minimum:   MILI_PAIRS(v <= w || mili_is_nan(v) ? v : w); break;
    case MILI_BINARY_mask_fill: MILI_PAIRS(w != 0 ? v : p); break;
    case MILI_BINARY_weights:   MILI_PAIRS(mili_is_low(w) ? 0 : v - w);              // softmax from its log-sum-exp: e^(v - w), 0 where w is -inf
                                for (int64_t i = 0; i < n; i++) if (mili_is_low(b[i * sb])) y[i] = -MILI_INF;
                                K->exp(y, y, n); break;
    case MILI_BINARY_drop:      MILI_PAIRS(w < p ? 0 : v * (1 / (1 - p))); break;
    case MILI_BINARY_broadcast: MILI_PAIRS(v); break;
    case MILI_BINARY_COUNT:     break;
    }
}

MILI_FN void mili_binary_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const mili_kernels *K = MILI_K(x);
    const int second = n->input_count > 1;
    const mil_real *a = MILI_IN(x, 0), *b = second ? MILI_IN(x, 1) : a;
    const mil_node *na = n->input[0], *nb = second ? n->input[1] : na;
    mil_real *y = MILI_OUT(x);
    const int64_t cols = n->cols;
    if (n->kind == MIL_KIND_ROWS) {
        const int64_t ca = na->rank ? na->cols : 1, cb = nb->rank ? nb->cols : 1;
        const int64_t ra = n->row_inputs & 1 ? ca : 0, rb = second ? (n->row_inputs & 2 ? cb : 0) : ra;
        if (ra == cols && rb == cols) { mili_binary_span(K, n->i[0], n->r[0], y, a, 1, b, 1, x->rows * cols); return; }
        for (int64_t r = 0; r < x->rows; r++)
            mili_binary_span(K, n->i[0], n->r[0], y + r * cols, a + r * ra, ca == 1 ? 0 : 1, b + r * rb, cb == 1 ? 0 : 1, cols);
        return;
    }
    for (int64_t r = 0; r < n->rows; r++) {                // any broadcast: the offset of each row, axis by axis
        int64_t at = r, offset[2] = { 0, 0 };
        for (int k = 0; k <= second; k++) {
            const mil_node *in = k ? nb : na;
            int64_t step = in->rank ? in->cols : 1, rest = at;
            for (int i = n->rank - 2; i >= 0; i--) {
                const int j = i - (n->rank - in->rank);    // the input's axis under the result's axis i
                const int64_t coordinate = rest % n->shape[i];
                rest /= n->shape[i];
                if (j < 0) continue;
                if (in->shape[j] != 1) offset[k] += coordinate * step;
                step *= in->shape[j];
            }
        }
        const int64_t ca = na->rank ? na->cols : 1, cb = nb->rank ? nb->cols : 1;
        mili_binary_span(K, n->i[0], n->r[0], y + r * cols, a + offset[0], ca == 1 ? 0 : 1, b + (second ? offset[1] : offset[0]), cb == 1 ? 0 : 1, cols);
    }
}

// How an input stands to the result: 1 row by row, 0 one row for all, -1 otherwise.
MILI_FN int mili_broadcast_rows(const mil_node *in, int rank, const int64_t *shape)
{
    int aligned = 1, whole = 1;
    for (int i = rank - 2; i >= 0; i--) {
        const int j = i - (rank - in->rank);
        const int64_t length = j >= 0 && j < in->rank - 1 ? in->shape[j] : 1;
        aligned &= length == shape[i];
        whole &= length == 1;
    }
    return aligned && rank > 1 ? 1 : whole ? 0 : aligned ? 1 : -1;
}

MILI_FN int mili_broadcast_shape(const mil_node *a, const mil_node *b, int *rank, int64_t *shape)
{
    *rank = MILI_MAX(a->rank, b->rank);
    for (int i = 0; i < *rank; i++) {
        const int ia = i - (*rank - a->rank), ib = i - (*rank - b->rank);
        const int64_t la = ia >= 0 ? a->shape[ia] : 1, lb = ib >= 0 ? b->shape[ib] : 1;
        if (la != lb && la != 1 && lb != 1) return 0;
        shape[i] = la == 1 ? lb : la;
    }
    return 1;
}

MILI_FN mil_node *mili_binary_record(mil_node *a, mil_node *b, mili_binary_kind kind, int rank, const int64_t *shape, double param);

#ifndef MIL_NO_TRAINING
MILI_FN mil_node *mili_sum_like(mil_node *dy, const mil_node *x) { return mil_sum_to(dy, x->rank, x->shape); }

// 1 where the left side of a maximum or minimum was taken, else 0; times dy or the rest of it.
MILI_FN void mili_select_grad_run(const mil_exec *x)
{
    const mil_real *a = MILI_IN(x, 0), *b = MILI_IN(x, 1), *d = MILI_IN(x, 2);
    const int64_t n = x->rows * x->node->cols;
    const int smaller = (int)x->node->i[0], right = (int)x->node->i[1];
    for (int64_t i = 0; i < n; i++) {
        const int left = smaller ? a[i] <= b[i] : a[i] >= b[i];
        MILI_OUT(x)[i] = left != right ? d[i] : 0;
    }
}
static const mil_op mili_op_select_grad = MILI_ROWS_OP("gradient of maximum", mili_select_grad_run, NULL);

MILI_FN mil_node *mili_select_grad(const mil_node *n, mil_node *dy, int right)
{
    mil_spec s = mil_spec_make(&mili_op_select_grad, MIL_KIND_ROWS, n->rank, n->shape);
    s.input_count = 3;
    s.input[0] = mil_broadcast(n->input[0], n->rank, n->shape);
    s.input[1] = mil_broadcast(n->input[1], n->rank, n->shape);
    s.input[2] = dy;
    s.row_inputs = 7;
    s.i[0] = n->i[0] == MILI_BINARY_minimum;
    s.i[1] = right;
    return mil_record(n->tape, &s);
}

MILI_FN void mili_binary_grad(mil_node *n, mil_node *dy)
{
    mil_node *a = n->input[0], *b = n->input_count > 1 ? n->input[1] : NULL;
    const int wa = mil_wants_grad(a), wb = mil_wants_grad(b);
    switch ((mili_binary_kind)n->i[0]) {
    case MILI_BINARY_add:
        if (wa) mil_add_grad(a, mili_sum_like(dy, a));
        if (wb) mil_add_grad(b, mili_sum_like(dy, b));
        break;
    case MILI_BINARY_sub:
        if (wa) mil_add_grad(a, mili_sum_like(dy, a));
        if (wb) mil_add_grad(b, mili_sum_like(mil_affine(dy, -1, 0), b));
        break;
    case MILI_BINARY_mul:
        if (wa) mil_add_grad(a, mili_sum_like(mil_mul(dy, b), a));
        if (wb) mil_add_grad(b, mili_sum_like(mil_mul(dy, a), b));
        break;
    case MILI_BINARY_div:                                  // d(a/b) = da / b - (a/b) db / b
        if (wa) mil_add_grad(a, mili_sum_like(mil_div(dy, b), a));
        if (wb) mil_add_grad(b, mili_sum_like(mil_affine(mil_div(mil_mul(dy, n), b), -1, 0), b));
        break;
    case MILI_BINARY_maximum:
    case MILI_BINARY_minimum:
        if (wa) mil_add_grad(a, mili_sum_like(mili_select_grad(n, dy, 0), a));
        if (wb) mil_add_grad(b, mili_sum_like(mili_select_grad(n, dy, 1), b));
        break;
    case MILI_BINARY_mask_fill:
        if (wa) mil_add_grad(a, mili_sum_like(mil_mask_fill(dy, b, 0), a));
        break;
    case MILI_BINARY_weights: {                            // y = exp(a - b)
        mil_node *g = mil_mul(dy, n);
        if (wa) mil_add_grad(a, mili_sum_like(g, a));
        if (wb) mil_add_grad(b, mili_sum_like(mil_affine(g, -1, 0), b));
        break;
    }
    case MILI_BINARY_drop:
        if (wa) mil_add_grad(a, mili_binary_record(dy, b, MILI_BINARY_drop, n->rank, n->shape, n->r[0]));
        break;
    case MILI_BINARY_broadcast:
        if (wa) mil_add_grad(a, mili_sum_like(dy, a));
        break;
    case MILI_BINARY_COUNT: break;
    }
}
#endif

#define MILI_BINARY_ROW(name) MILI_LIGHT_OP(#name, mili_binary_run, mili_binary_grad),
static const mil_op mili_binary_ops[] = { MILI_BINARY_LIST(MILI_BINARY_ROW) };
#undef MILI_BINARY_ROW

MILI_FN mil_node *mili_binary_record(mil_node *a, mil_node *b, mili_binary_kind kind, int rank, const int64_t *shape, double param)
{
    const int rows_a = mili_broadcast_rows(a, rank, shape), rows_b = b ? mili_broadcast_rows(b, rank, shape) : 0;
    const int by_rows = rows_a >= 0 && rows_b >= 0;
    mil_spec s = mil_spec_make(&mili_binary_ops[kind], by_rows ? MIL_KIND_ROWS : MIL_KIND_WHOLE, rank, shape);
    s.input_count = b ? 2 : 1;
    s.input[0] = a;
    s.input[1] = b;
    if (by_rows) s.row_inputs = (unsigned)(rows_a | rows_b << 1);
    s.i[0] = kind;
    s.r[0] = param;
    return mili_record(a->tape, &s);
}

MILI_FN mil_node *mili_binary(mil_node *a, mil_node *b, mili_binary_kind kind, double param)
{
    if (!mili_have(a, b, mili_binary_ops[kind].name)) return NULL;
    a = mili_real(a);
    b = mili_real(b);
    if (!a || !b) return NULL;
    int rank;
    int64_t shape[MIL_MAX_RANK];
    if (!mili_broadcast_shape(a, b, &rank, shape))
        return mil_tape_fail(a->tape, MIL_ERROR_SHAPE, "%s: %s and %s do not broadcast", mili_binary_ops[kind].name, MILI_SHAPE(a), MILI_SHAPE(b));
    if (kind == MILI_BINARY_mask_fill && (rank != a->rank || mili_shape_count(rank, shape) != a->count))
        return mil_tape_fail(a->tape, MIL_ERROR_SHAPE, "mask_fill: the mask %s does not broadcast to %s", MILI_SHAPE(b), MILI_SHAPE(a));
    return mili_binary_record(a, b, kind, rank, shape, param);
}

MIL_DEF mil_node *mil_add(mil_node *a, mil_node *b) { return mili_binary(a, b, MILI_BINARY_add, 0); }
MIL_DEF mil_node *mil_sub(mil_node *a, mil_node *b) { return mili_binary(a, b, MILI_BINARY_sub, 0); }
MIL_DEF mil_node *mil_mul(mil_node *a, mil_node *b) { return mili_binary(a, b, MILI_BINARY_mul, 0); }
MIL_DEF mil_node *mil_div(mil_node *a, mil_node *b) { return mili_binary(a, b, MILI_BINARY_div, 0); }
MIL_DEF mil_node *mil_maximum(mil_node *a, mil_node *b) { return mili_binary(a, b, MILI_BINARY_maximum, 0); }
MIL_DEF mil_node *mil_minimum(mil_node *a, mil_node *b) { return mili_binary(a, b, MILI_BINARY_minimum, 0); }
MIL_DEF mil_node *mil_mask_fill(mil_node *x, mil_node *mask, double value) { return mili_binary(x, mask, MILI_BINARY_mask_fill, value); }

MIL_DEF mil_node *mil_broadcast(mil_node *x, int rank, const int64_t *shape)
{
    x = mili_real(x);
    if (!x) return NULL;
    int ok = rank >= x->rank && rank <= MIL_MAX_RANK, same = rank == x->rank;
    for (int i = 0; ok && i < x->rank; i++) {
        const int64_t to = shape[i + rank - x->rank];
        ok = x->shape[i] == to || x->shape[i] == 1;
        same &= x->shape[i] == to;
    }
    if (!ok) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "broadcast: %s to %s", MILI_SHAPE(x), mili_shape_text(MILI_MIN(rank, MIL_MAX_RANK), shape).s);
    return same ? x : mili_binary_record(x, NULL, MILI_BINARY_broadcast, rank, shape, 0);
}

// ---- shapes ----
#ifndef MIL_NO_TRAINING
MILI_FN void mili_reshape_grad(mil_node *n, mil_node *dy) { mil_add_grad(n->input[0], mil_reshape(dy, n->input[0]->rank, n->input[0]->shape)); }
#endif
static const mil_op mili_op_reshape = MILI_ROWS_OP("reshape", mili_run_nothing, mili_reshape_grad);
static const mil_op mili_op_detach = { "detach", mili_run_nothing, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, MIL_OP_STOPS_GRADIENT };

MILI_FN mil_node *mili_view(mil_node *x, const mil_op *op, int rank, const int64_t *shape)
{
    mil_spec s = mil_spec_make(op, MIL_KIND_VIEW, rank, shape);
    s.dtype = x->dtype;
    s.input_count = 1;
    s.input[0] = x;
    return mil_record(x->tape, &s);
}

MIL_DEF mil_node *mil_reshape(mil_node *x, int rank, const int64_t *shape)
{
    x = mili_either(x);
    if (!x) return NULL;
    int64_t to[MIL_MAX_RANK], known = 1;
    int open = -1, ok = rank >= 0 && rank <= MIL_MAX_RANK, same = rank == x->rank;
    for (int i = 0; ok && i < rank; i++) {
        to[i] = shape[i];
        if (shape[i] == -1 && open < 0) open = i;
        else if (shape[i] < 0 || (shape[i] > 0 && known > INT64_MAX / shape[i])) ok = 0;
        else known *= shape[i];                            // checked below, against the count
        if (known > x->count && x->count > 0) ok = 0;
    }
    if (ok && open >= 0) {
        ok = known > 0 && x->count % known == 0;
        to[open] = ok ? x->count / known : 0;
    } else if (ok) ok = known == x->count;
    if (!ok) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "reshape: %s to %s", MILI_SHAPE(x), mili_shape_text(MILI_MAX(0, MILI_MIN(rank, MIL_MAX_RANK)), shape).s);
    for (int i = 0; same && i < rank; i++) same = to[i] == x->shape[i];
    return same ? x : mili_view(x, &mili_op_reshape, rank, to);
}

MIL_DEF mil_node *mil_squeeze(mil_node *x, int axis)
{
    if (!x) return NULL;
    const int a = mili_axis(x, axis, "squeeze");
    if (a < 0) return NULL;
    if (x->shape[a] != 1) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "squeeze: axis %d of %s is not 1", a, MILI_SHAPE(x));
    int64_t shape[MIL_MAX_RANK];
    for (int i = 0; i < x->rank - 1; i++) shape[i] = x->shape[i < a ? i : i + 1];
    return mil_reshape(x, x->rank - 1, shape);
}

MIL_DEF mil_node *mil_detach(mil_node *x)
{
    x = mili_real(x);
    return x ? mili_view(x, &mili_op_detach, x->rank, x->shape) : NULL;
}

// y[.., i_axes[k], ..] = x: walks the result in order and steps through x.
MILI_FN void mili_permute_body(const mil_exec *x, int64_t begin, int64_t end)
{
    const mil_node *n = x->node, *in = n->input[0];
    int64_t step[MIL_MAX_RANK], stride[MIL_MAX_RANK], s = 1;
    for (int a = in->rank - 1; a >= 0; a--) { stride[a] = s; s *= in->shape[a]; }
    for (int a = 0; a < n->rank; a++) step[a] = stride[n->i[a]];
    const int64_t cols = n->cols, inner = n->rank ? step[n->rank - 1] : 0;
    for (int64_t r = begin; r < end; r++) {
        int64_t at = r;
        const mil_real *src = MILI_IN(x, 0);
        for (int a = n->rank - 2; a >= 0; a--) { src += at % n->shape[a] * step[a]; at /= n->shape[a]; }
        mil_real *y = MILI_OUT(x) + r * cols;
        if (inner == 1) memcpy(y, src, (size_t)cols * sizeof *y);
        else for (int64_t j = 0; j < cols; j++) y[j] = src[j * inner];
    }
}
MILI_FN void mili_permute_run(const mil_exec *x) { mili_for(x, x->node->rows, x->node->cols, mili_permute_body); }

#ifndef MIL_NO_TRAINING
MILI_FN void mili_permute_grad(mil_node *n, mil_node *dy)
{
    int back[MIL_MAX_RANK];
    for (int a = 0; a < n->rank; a++) back[n->i[a]] = a;
    mil_add_grad(n->input[0], mil_permute(dy, back));
}
#endif
static const mil_op mili_op_permute = MILI_WHOLE_OP("permute", mili_permute_run, mili_permute_grad);

MIL_DEF mil_node *mil_permute(mil_node *x, const int *axes)
{
    x = mili_real(x);
    if (!x) return NULL;
    int64_t shape[MIL_MAX_RANK];
    unsigned seen = 0;
    int last = -1, moved = 0;                              // whether axes longer than 1 change their order
    mil_spec s = mil_spec_make(&mili_op_permute, MIL_KIND_WHOLE, 0, NULL);
    for (int a = 0; a < x->rank; a++) {
        if (axes[a] < 0 || axes[a] >= x->rank || seen >> axes[a] & 1)
            return mil_tape_fail(x->tape, MIL_ERROR_ARGUMENT, "permute: axis %d of %s is not a permutation", axes[a], MILI_SHAPE(x));
        seen |= 1u << axes[a];
        shape[a] = s.shape[a] = x->shape[axes[a]];
        s.i[a] = axes[a];
        if (shape[a] == 1) continue;
        if (axes[a] < last) moved = 1;
        last = axes[a];
    }
    if (!moved) return mil_reshape(x, x->rank, shape);
    s.rank = x->rank;
    s.input_count = 1;
    s.input[0] = x;
    return mil_record(x->tape, &s);
}

MIL_DEF mil_node *mil_transpose(mil_node *x)
{
    if (!x) return NULL;
    if (x->rank < 2) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "transpose: needs two axes, got %s", MILI_SHAPE(x));
    int axes[MIL_MAX_RANK];
    for (int a = 0; a < x->rank; a++) axes[a] = a;
    axes[x->rank - 1] = x->rank - 2;
    axes[x->rank - 2] = x->rank - 1;
    return mil_permute(x, axes);
}

// ---- concat, slice, pad: one axis, around which the tensor is [outer, n, inner] ----
// i[0] = axis. Along the last axis they are row-wise.
MILI_FN void mili_concat_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const int by_rows = n->kind == MIL_KIND_ROWS;
    const mili_around to = mili_around_axis(n, (int)n->i[0]);
    const int64_t outer = by_rows ? x->rows : to.outer;
    const size_t size = mil_dtype_size(n->dtype);
    size_t at = 0;
    for (int k = 0; k < n->input_count; k++) {
        const size_t piece = (size_t)(n->input[k]->shape[n->i[0]] * to.inner) * size, whole = (size_t)(to.n * to.inner) * size;
        for (int64_t o = 0; o < outer; o++)
            memcpy((char *)x->out + (size_t)o * whole + at, (const char *)x->in[k] + (size_t)o * piece, piece);
        at += piece;
    }
}

#ifndef MIL_NO_TRAINING
MILI_FN void mili_concat_grad(mil_node *n, mil_node *dy)
{
    int64_t start = 0;
    for (int k = 0; k < n->input_count; k++) {
        const int64_t length = n->input[k]->shape[n->i[0]];
        if (mil_wants_grad(n->input[k])) mil_add_grad(n->input[k], mil_slice(dy, (int)n->i[0], start, length));
        start += length;
    }
}
#endif
static const mil_op mili_op_concat = MILI_ROWS_OP("concat", mili_concat_run, mili_concat_grad);

// Up to MIL_MAX_INPUTS at once.
MILI_FN mil_node *mili_concat_few(mil_node *const *x, int count, int axis)
{
    if (count == 1) return x[0];
    const int index = x[0]->dtype == MIL_I64;
    mil_node *first = index ? mili_index(x[0]) : mili_real(x[0]);
    if (!first) return NULL;
    const int a = mili_axis(first, axis, "concat");
    if (a < 0) return NULL;
    mil_spec s = mil_spec_make(&mili_op_concat, a == first->rank - 1 ? MIL_KIND_ROWS : MIL_KIND_WHOLE, first->rank, first->shape);
    s.dtype = first->dtype;
    s.shape[a] = 0;
    for (int k = 0; k < count; k++) {
        mil_node *in = index ? mili_index(x[k]) : mili_real(x[k]);
        if (!in) return NULL;
        int ok = in->rank == first->rank;
        for (int i = 0; ok && i < in->rank; i++) ok = i == a || in->shape[i] == first->shape[i];
        if (!ok) return mil_tape_fail(first->tape, MIL_ERROR_SHAPE, "concat: %s and %s along axis %d", MILI_SHAPE(first), MILI_SHAPE(in), a);
        s.shape[a] += in->shape[a];
        s.input[k] = in;
    }
    s.input_count = count;
    s.row_inputs = s.kind == MIL_KIND_ROWS ? (1u << count) - 1 : 0;
    s.i[0] = a;
    return mil_record(first->tape, &s);
}

MIL_DEF mil_node *mil_concat(mil_node *const *x, int count, int axis)
{
    mil_node *level[12][MIL_MAX_INPUTS];                   // level l holds results of 8^l inputs each, in order: more than an int counts
    int held[12] = { 0 };
    if (count < 1 || !x || !x[0]) return NULL;
    for (int k = 1; k < count; k++) if (!mili_have(x[0], x[k], "concat")) return NULL;
    if (mili_axis(x[0], axis, "concat") < 0) return NULL;
    for (int k = 0; k < count; k++) {
        mil_node *n = x[k];
        int l = 0;
        for (; held[l] == MIL_MAX_INPUTS; l++) {           // a full level becomes one entry of the next
            mil_node *whole = mili_concat_few(level[l], held[l], axis);
            if (!whole) return NULL;
            level[l][0] = n;
            held[l] = 1;
            n = whole;
        }
        level[l][held[l]++] = n;
    }
    int top = 11;
    while (!held[top]) top--;
    for (int l = 0; l < top; l++) {                        // what stands lower comes later
        mil_node *rest = mili_concat_few(level[l], held[l], axis);
        if (held[l + 1] == MIL_MAX_INPUTS) {
            level[l + 1][0] = mili_concat_few(level[l + 1], held[l + 1], axis);
            held[l + 1] = 1;
        }
        if (!rest || !level[l + 1][0]) return NULL;
        level[l + 1][held[l + 1]++] = rest;
    }
    return mili_concat_few(level[top], held[top], axis);
}

// i[1] = where the piece starts in x.
MILI_FN void mili_slice_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const mili_around from = mili_around_axis(n->input[0], (int)n->i[0]);
    const int64_t outer = n->kind == MIL_KIND_ROWS ? x->rows : from.outer;
    const size_t size = mil_dtype_size(n->dtype), piece = (size_t)(n->shape[n->i[0]] * from.inner) * size;
    const size_t whole = (size_t)(from.n * from.inner) * size, at = (size_t)(n->i[1] * from.inner) * size;
    for (int64_t o = 0; o < outer; o++) memcpy((char *)x->out + (size_t)o * piece, (const char *)x->in[0] + (size_t)o * whole + at, piece);
}

// i[1] = zeros before.
MILI_FN void mili_pad_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const mili_around to = mili_around_axis(n, (int)n->i[0]);
    const int64_t outer = n->kind == MIL_KIND_ROWS ? x->rows : to.outer;
    const size_t size = mil_dtype_size(n->dtype), piece = (size_t)(n->input[0]->shape[n->i[0]] * to.inner) * size;
    const size_t whole = (size_t)(to.n * to.inner) * size, at = (size_t)(n->i[1] * to.inner) * size;
    memset(x->out, 0, (size_t)outer * whole);
    for (int64_t o = 0; o < outer; o++) memcpy((char *)x->out + (size_t)o * whole + at, (const char *)x->in[0] + (size_t)o * piece, piece);
}

#ifndef MIL_NO_TRAINING
MILI_FN void mili_slice_grad(mil_node *n, mil_node *dy)
{
    const int a = (int)n->i[0];
    mil_add_grad(n->input[0], mil_pad(dy, a, n->i[1], n->input[0]->shape[a] - n->i[1] - n->shape[a]));
}
MILI_FN void mili_pad_grad(mil_node *n, mil_node *dy)
{
    const int a = (int)n->i[0];
    mil_add_grad(n->input[0], mil_slice(dy, a, n->i[1], n->input[0]->shape[a]));
}
#endif
static const mil_op mili_op_slice = MILI_ROWS_OP("slice", mili_slice_run, mili_slice_grad);
static const mil_op mili_op_pad = MILI_ROWS_OP("pad", mili_pad_run, mili_pad_grad);

MILI_FN mil_node *mili_along(mil_node *x, const mil_op *op, int a, int64_t start, int64_t length)
{
    mil_spec s = mil_spec_make(op, a == x->rank - 1 ? MIL_KIND_ROWS : MIL_KIND_WHOLE, x->rank, x->shape);
    s.dtype = x->dtype;
    s.shape[a] = length;
    s.input_count = 1;
    s.input[0] = x;
    s.row_inputs = s.kind == MIL_KIND_ROWS;
    s.i[0] = a;
    s.i[1] = start;
    return mil_record(x->tape, &s);
}

MIL_DEF mil_node *mil_slice(mil_node *x, int axis, int64_t start, int64_t length)
{
    x = mili_either(x);
    if (!x) return NULL;
    const int a = mili_axis(x, axis, "slice");
    if (a < 0) return NULL;
    if (start < 0 || length < 0 || start > x->shape[a] - length)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "slice: %lld from %lld on of axis %d of %s", (long long)length, (long long)start, a, MILI_SHAPE(x));
    return length == x->shape[a] ? x : mili_along(x, &mili_op_slice, a, start, length);
}

MIL_DEF mil_node *mil_pad(mil_node *x, int axis, int64_t before, int64_t after)
{
    x = mili_real(x);
    if (!x) return NULL;
    const int a = mili_axis(x, axis, "pad");
    if (a < 0) return NULL;
    if (before < 0 || after < 0 || before > INT64_MAX / 16 || after > INT64_MAX / 16)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "pad: %lld and %lld zeros: negative or too many", (long long)before, (long long)after);
    return before + after == 0 ? x : mili_along(x, &mili_op_pad, a, before, before + x->shape[a] + after);
}

// ---- reductions over one axis ----
// Over the last axis they are row-wise: [.., n] -> [.., 1]. Over another they keep a state per column: [outer, n, inner] -> [outer, 1, inner].
#define MILI_REDUCTION_LIST(X) X(sum) X(mean) X(max) X(min) X(logsumexp) X(argmax)
#define MILI_REDUCTION_ENUM(name) MILI_REDUCTION_##name,
typedef enum mili_reduction_kind { MILI_REDUCTION_LIST(MILI_REDUCTION_ENUM) MILI_REDUCTION_COUNT } mili_reduction_kind;
#undef MILI_REDUCTION_ENUM

MILI_FN int64_t mili_row_argmax(const mil_real *x, int64_t n, int smallest)
{
    int64_t best = 0;
    for (int64_t j = 0; j < n; j++) {
        if (mili_is_nan(x[j])) return j;                   // as the maximum is then: NaN, and the first one
        if (smallest ? x[j] < x[best] : x[j] > x[best]) best = j;
    }
    return best;
}

// Row by row. A maximum writes the place it stands at into the second result, for the gradient.
MILI_FN void mili_reduction_rows(const mil_exec *x)
{
    const mili_kernels *K = MILI_K(x);
    const int64_t n = x->node->input[0]->cols, kind = x->node->i[0];
    for (int64_t r = 0; r < x->rows; r++) {
        const mil_real *a = MILI_IN(x, 0) + r * n;
        mil_real *y = MILI_OUT(x) + r;
        switch ((mili_reduction_kind)kind) {
        case MILI_REDUCTION_sum:  *y = K->sum(a, n); break;
        case MILI_REDUCTION_mean: *y = K->sum(a, n) / (mil_real)n; break;
        case MILI_REDUCTION_max:
        case MILI_REDUCTION_min: {
            const int64_t at = mili_row_argmax(a, n, kind == MILI_REDUCTION_min);
            *y = kind == MILI_REDUCTION_min ? K->min(a, n) : K->max(a, n);
            if (x->second) ((int64_t *)x->second)[r] = at;
            break;
        }
        case MILI_REDUCTION_logsumexp: {
            const mil_real top = K->max(a, n);
            mil_real sum = 0;
            if (mili_fabs(top) == MILI_INF) { *y = top; break; }
            for (int64_t j = 0; j < n; j++) sum += mili_exp(a[j] - top);
            *y = top + mili_log(sum);
            break;
        }
        case MILI_REDUCTION_argmax: ((int64_t *)x->out)[r] = mili_row_argmax(a, n, 0); break;
        case MILI_REDUCTION_COUNT: break;
        }
    }
}

// State: for maxima the row it stands in; then two reals per column (value and sum of a tile; or maximum and sum of exponentials).
MILI_FN int64_t mili_reduction_inner(const mil_node *n) { return n->outer ? n->count / n->outer : 0; }
MILI_FN size_t mili_reduction_state(const mil_node *n) { return (size_t)mili_reduction_inner(n) * (2 * sizeof(mil_real) + sizeof(int64_t)); }

MILI_FN void mili_reduction_begin(const mil_exec *x)
{
    const int64_t inner = mili_reduction_inner(x->node), kind = x->node->i[0];
    int64_t *at = (int64_t *)x->state;
    mil_real *value = (mil_real *)(void *)(at + inner), *sum = value + inner;
    const mil_real start = kind == MILI_REDUCTION_min ? MILI_INF : kind == MILI_REDUCTION_sum || kind == MILI_REDUCTION_mean ? 0 : -MILI_INF;
    for (int64_t j = 0; j < inner; j++) { at[j] = -1; value[j] = start; sum[j] = 0; }
}

// Adds the pair (maximum m, sum s of exp(x - m)) of a log-sum-exp to another.
MILI_INLINE void mili_logsumexp_add(mil_real *top, mil_real *sum, mil_real m, mil_real s)
{
    if (mili_is_low(m)) return;
    if (m <= *top && !mili_is_nan(m)) { *sum += m == *top ? s : s * mili_exp(m - *top); return; }     // equal: also when both are infinite
    *sum = mili_is_low(*top) ? s : *sum * mili_exp(*top - m) + s;
    *top = m;                                              // also when m is NaN: it stays
}

MILI_FN void mili_reduction_step(const mil_exec *x)
{
    const mili_kernels *K = MILI_K(x);
    const int64_t inner = mili_reduction_inner(x->node), kind = x->node->i[0];
    int64_t *at = (int64_t *)x->state;
    mil_real *value = (mil_real *)(void *)(at + inner), *sum = value + inner;
    for (int64_t r = 0; r < x->rows; r++) {
        const mil_real *a = MILI_IN(x, 0) + r * inner;
        switch ((mili_reduction_kind)kind) {
        case MILI_REDUCTION_sum:                           // tile by tile, so that rounding grows with the tiles, not the rows
        case MILI_REDUCTION_mean:
            K->add(sum, sum, a, inner);
            if ((r + 1) % MILI_TILE_ROWS != 0 && r + 1 < x->rows) break;
            K->add(value, value, sum, inner);
            memset(sum, 0, (size_t)inner * sizeof *sum);
            break;
        case MILI_REDUCTION_max:
        case MILI_REDUCTION_argmax:
            for (int64_t j = 0; j < inner; j++)
                if (at[j] < 0 || a[j] > value[j] || mili_is_nan(a[j])) { if (at[j] < 0 || !mili_is_nan(value[j])) { value[j] = a[j]; at[j] = x->row + r; } }
            break;
        case MILI_REDUCTION_min:
            for (int64_t j = 0; j < inner; j++)
                if (at[j] < 0 || a[j] < value[j] || mili_is_nan(a[j])) { if (at[j] < 0 || !mili_is_nan(value[j])) { value[j] = a[j]; at[j] = x->row + r; } }
            break;
        case MILI_REDUCTION_logsumexp: for (int64_t j = 0; j < inner; j++) mili_logsumexp_add(&value[j], &sum[j], a[j], 1); break;
        case MILI_REDUCTION_COUNT: break;
        }
    }
}

MILI_FN void mili_reduction_merge(const mil_exec *x, void *into, const void *from)
{
    const int64_t inner = mili_reduction_inner(x->node), kind = x->node->i[0];
    int64_t *at = (int64_t *)into;
    const int64_t *at2 = (const int64_t *)from;
    mil_real *value = (mil_real *)(void *)(at + inner), *sum = value + inner;
    const mil_real *value2 = (const mil_real *)(const void *)(at2 + inner), *sum2 = value2 + inner;
    for (int64_t j = 0; j < inner; j++) {
        int take = 0;
        switch ((mili_reduction_kind)kind) {
        case MILI_REDUCTION_sum:
        case MILI_REDUCTION_mean: value[j] += value2[j]; break;
        case MILI_REDUCTION_logsumexp: mili_logsumexp_add(&value[j], &sum[j], value2[j], sum2[j]); break;
        default:                                           // the better one; among equals the earlier row
            if (at2[j] < 0) break;
            take = at[j] < 0 || mili_is_nan(value2[j]) || (kind == MILI_REDUCTION_min ? value2[j] < value[j] : value2[j] > value[j]);
            take |= value2[j] == value[j] && at2[j] < at[j];
            if (at[j] >= 0 && mili_is_nan(value[j])) take = mili_is_nan(value2[j]) && at2[j] < at[j];
            if (take) { value[j] = value2[j]; at[j] = at2[j]; }
        }
    }
}

MILI_FN void mili_reduction_finish(const mil_exec *x)
{
    const int64_t inner = mili_reduction_inner(x->node), kind = x->node->i[0];
    const int64_t *at = (const int64_t *)x->state;
    const mil_real *value = (const mil_real *)(const void *)(at + inner), *sum = value + inner;
    for (int64_t j = 0; j < inner; j++) {
        switch ((mili_reduction_kind)kind) {
        case MILI_REDUCTION_mean:      MILI_OUT(x)[j] = value[j] / (mil_real)x->all_rows; break;
        case MILI_REDUCTION_logsumexp: MILI_OUT(x)[j] = mili_is_low(value[j]) ? value[j] : value[j] + mili_log(sum[j]); break;
        case MILI_REDUCTION_argmax:    ((int64_t *)x->out)[j] = MILI_MAX(at[j], 0); break;
        default:
            MILI_OUT(x)[j] = value[j];
            if (x->second) ((int64_t *)x->second)[j] = MILI_MAX(at[j], 0);
        }
    }
}

#ifndef MIL_NO_TRAINING
// dx is dy where the maximum stood, else 0. Inputs: places and dy, both [outer, 1, inner]; x is [outer, n, inner].
MILI_FN void mili_place_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const mili_around s = mili_around_axis(n, (int)n->i[0]);
    const int64_t *at = MILI_IN_INDEX(x, 0);
    const mil_real *dy = MILI_IN(x, 1);
    mil_real *dx = MILI_OUT(x);
    if (n->row_inputs) {                                   // last axis: a place per row
        memset(dx, 0, (size_t)(x->rows * s.n) * sizeof *dx);
        for (int64_t r = 0; r < x->rows; r++) dx[r * s.n + at[r]] = dy[r];
    } else if (n->kind == MIL_KIND_ROWS) {                 // over the rows: each row looks whether it was the place
        for (int64_t r = 0; r < x->rows; r++)
            for (int64_t j = 0; j < s.inner; j++) dx[r * s.inner + j] = at[j] == x->row + r ? dy[j] : 0;
    } else {
        memset(dx, 0, (size_t)n->count * sizeof *dx);
        for (int64_t o = 0; o < s.outer; o++)
            for (int64_t j = 0; j < s.inner; j++) dx[(o * s.n + at[o * s.inner + j]) * s.inner + j] = dy[o * s.inner + j];
    }
}
static const mil_op mili_op_place = MILI_ROWS_OP("gradient of a maximum", mili_place_run, NULL);

MILI_FN void mili_reduction_grad(mil_node *n, mil_node *dy)
{
    mil_node *x = n->input[0];
    const int a = (int)n->i[1];
    switch ((mili_reduction_kind)n->i[0]) {
    case MILI_REDUCTION_sum:  mil_add_grad(x, mil_broadcast(dy, x->rank, x->shape)); break;
    case MILI_REDUCTION_mean: mil_add_grad(x, mil_broadcast(mil_affine(dy, 1.0 / (double)x->shape[a], 0), x->rank, x->shape)); break;
    case MILI_REDUCTION_logsumexp: mil_add_grad(x, mil_mul(mili_binary(x, n, MILI_BINARY_weights, 0), dy)); break;
    case MILI_REDUCTION_max:
    case MILI_REDUCTION_min: {
        const mili_around s = mili_around_axis(x, a);
        const int last = a == x->rank - 1, rows = last || (s.outer == 1 && a == x->rank - 2);
        mil_spec spec = mil_spec_make(&mili_op_place, rows ? MIL_KIND_ROWS : MIL_KIND_WHOLE, x->rank, x->shape);
        spec.input_count = 2;
        spec.input[0] = n->second;
        spec.input[1] = dy;
        spec.row_inputs = last ? 3 : 0;
        spec.i[0] = a;
        mil_add_grad(x, mili_record(n->tape, &spec));
        break;
    }
    default: break;
    }
}
#endif

#define MILI_REDUCTION_ROW(name) \
    { #name, mili_reduction_rows, mili_reduction_state, mili_reduction_begin, mili_reduction_step, mili_reduction_merge, \
      mili_reduction_finish, NULL, NULL, NULL, MILI_GRAD(mili_reduction_grad), 0 },
static const mil_op mili_reduction_ops[] = { MILI_REDUCTION_LIST(MILI_REDUCTION_ROW) };
#undef MILI_REDUCTION_ROW

MILI_FN mil_node *mili_reduction(mil_node *x, int axis, mili_reduction_kind kind)
{
    x = mili_real(x);
    if (!x) return NULL;
    const char *name = mili_reduction_ops[kind].name;
    const int a = mili_axis(x, axis, name);
    if (a < 0) return NULL;
    const mili_around s = mili_around_axis(x, a);
    if (s.n < 1 && kind != MILI_REDUCTION_sum) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "%s: axis %d of %s is empty", name, a, MILI_SHAPE(x));
    mil_spec spec = mil_spec_make(&mili_reduction_ops[kind], a == x->rank - 1 ? MIL_KIND_ROWS : MIL_KIND_REDUCE, x->rank, x->shape);
    spec.shape[a] = 1;
    spec.dtype = kind == MILI_REDUCTION_argmax ? MIL_I64 : MIL_REAL_DTYPE;
    spec.outer = s.outer;
    spec.in_rows = s.n;
    spec.input_count = 1;
    spec.input[0] = x;
    spec.row_inputs = 1;
    spec.i[0] = kind;
    spec.i[1] = a;
    mil_node *n = mil_record(x->tape, &spec);
    if (kind == MILI_REDUCTION_max || kind == MILI_REDUCTION_min) mil_node_second(n, MIL_I64, spec.rank, spec.shape);
    return n;
}

MIL_DEF mil_node *mil_sum(mil_node *x, int axis) { return mili_reduction(x, axis, MILI_REDUCTION_sum); }
MIL_DEF mil_node *mil_mean(mil_node *x, int axis) { return mili_reduction(x, axis, MILI_REDUCTION_mean); }
MIL_DEF mil_node *mil_max(mil_node *x, int axis) { return mili_reduction(x, axis, MILI_REDUCTION_max); }
MIL_DEF mil_node *mil_min(mil_node *x, int axis) { return mili_reduction(x, axis, MILI_REDUCTION_min); }
MIL_DEF mil_node *mil_logsumexp(mil_node *x, int axis) { return mili_reduction(x, axis, MILI_REDUCTION_logsumexp); }
MIL_DEF mil_node *mil_argmax(mil_node *x, int axis) { return mili_reduction(x, axis, MILI_REDUCTION_argmax); }

MIL_DEF mil_node *mil_sum_all(mil_node *x)
{
    x = mili_real(x);
    if (!x) return NULL;
    int64_t flat[2];
    flat[0] = x->rows;
    flat[1] = x->cols;
    return mil_reshape(mil_sum(mil_sum(mil_reshape(x, 2, flat), 1), 0), 0, NULL);
}

MIL_DEF mil_node *mil_sum_to(mil_node *x, int rank, const int64_t *shape)
{
    x = mili_real(x);
    if (!x) return NULL;
    int ok = rank <= x->rank, same = rank == x->rank, leading = 1;   // leading: all axes but the last go
    for (int i = 0; ok && i < x->rank; i++) {
        const int j = i - (x->rank - rank);
        const int64_t to = j >= 0 ? shape[j] : 1;
        ok = to == x->shape[i] || to == 1;
        same &= j >= 0 && to == x->shape[i];
        leading &= i == x->rank - 1 ? to == x->shape[i] : to == 1;
    }
    if (!ok) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "sum_to: %s to %s", MILI_SHAPE(x), mili_shape_text(MILI_MIN(rank, MIL_MAX_RANK), shape).s);
    if (same) return x;
    if (leading && x->rank > 1) {                          // one pass over the rows, wherever they belong
        int64_t flat[2];
        flat[0] = x->rows;
        flat[1] = x->cols;
        x = mil_sum(mil_reshape(x, 2, flat), 0);
    } else {
        const int had = x->rank;
        for (int i = had - 1; i >= 0 && x; i--) {
            const int j = i - (had - rank);
            if (x->shape[i] != (j >= 0 ? shape[j] : 1)) x = mil_sum(x, i);
        }
    }
    return mil_reshape(x, rank, shape);
}

// ---- softmax ----
// y = exp(x - lse), lse the log of the sum of exp(x) along the axis. A slice that is all -inf gives zeros.
MILI_FN void mili_softmax_run(const mil_exec *x)
{
    const int64_t n = x->node->cols;
    for (int64_t r = 0; r < x->rows; r++) mili_softmax_row(MILI_K(x), MILI_OUT(x) + r * n, MILI_IN(x, 0) + r * n, n);
}

#ifndef MIL_NO_TRAINING
// dx = y (dy - sum(dy y)). Reads y and not x, so x's memory is free again after the forward run.
MILI_FN void mili_softmax_grad_run(const mil_exec *x)
{
    const int64_t n = x->node->cols;
    for (int64_t r = 0; r < x->rows; r++) {
        const mil_real *y = MILI_IN(x, 0) + r * n, *dy = MILI_IN(x, 1) + r * n;
        mil_real *dx = MILI_OUT(x) + r * n;
        const mil_real sum = MILI_K(x)->dot(y, dy, n);
        for (int64_t j = 0; j < n; j++) dx[j] = y[j] * (dy[j] - sum);
    }
}
static const mil_op mili_op_softmax_grad = MILI_ROWS_OP("gradient of softmax", mili_softmax_grad_run, NULL);

MILI_FN void mili_softmax_grad(mil_node *n, mil_node *dy)
{
    mil_spec s = mil_spec_make(&mili_op_softmax_grad, MIL_KIND_ROWS, n->rank, n->shape);
    s.input_count = 2;
    s.input[0] = n;
    s.input[1] = dy;
    s.row_inputs = 3;
    mil_add_grad(n->input[0], mil_record(n->tape, &s));
}
#endif
static const mil_op mili_op_softmax = MILI_ROWS_OP("softmax", mili_softmax_run, mili_softmax_grad);

MIL_DEF mil_node *mil_softmax(mil_node *x, int axis)
{
    x = mili_real(x);
    if (!x) return NULL;
    const int a = mili_axis(x, axis, "softmax");
    if (a < 0) return NULL;
    if (a != x->rank - 1) return mili_binary(x, mil_logsumexp(x, a), MILI_BINARY_weights, 0);
    if (x->cols < 1) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "softmax: %s has an empty axis", MILI_SHAPE(x));
    mil_spec s = mil_spec_make(&mili_op_softmax, MIL_KIND_ROWS, x->rank, x->shape);
    s.input_count = 1;
    s.input[0] = x;
    s.row_inputs = 1;
    return mil_record(x->tape, &s);
}

MIL_DEF mil_node *mil_log_softmax(mil_node *x, int axis) { return mil_sub(x, mil_logsumexp(x, axis)); }

// ---- matrix products ----
// Three forms of one product:
//   linear      rows of x by a matrix that is the same for all rows: row-wise, the matrix packed once
//   matmul_tn   a^T b over the rows of both: a reduction (weight gradients, pooling)
//   matmul      everything else: batches of matrices

// y = x W^T + b (i[0] = 1: W [out, in] is read transposed), or x W + b (i[0] = 0: W [in, out]). W is packed into panels once, before
// the first rows, unless there are so few rows (below 32) that packing would cost more than it saves. i[1] = 1: in bfloat16
// (MIL_PRECISION_BF16), then always packed.
MILI_FN size_t mili_linear_prepare_bytes(const mil_node *n)
{
#if defined(MIL_USE_CBLAS)
    MILI_UNUSED(n);
    return 0;                                              // it packs for itself
#else
    if (n->rows < 32 && !n->i[1]) return 0;
    // A packed W is padded to whole panels; 64 is no less than any CPU's panel is wide, so this is room for each of them.
    const int64_t in = n->input[0]->cols, panel = 64;
    return (size_t)((n->cols + panel) * (in + panel)) * sizeof(mil_real);
#endif
}

typedef struct mili_pack_job { const mil_exec *x; int64_t panels, chunk; } mili_pack_job;

MILI_FN void mili_pack_task(void *arg, int64_t index, void *scratch)
{
    const mili_pack_job *job = (const mili_pack_job *)arg;
    const mil_exec *x = job->x;
    const int64_t in = x->node->input[0]->cols, out = x->node->cols;
    const int transposed = (int)x->node->i[0];
    const int64_t first = index * job->chunk, end = MILI_MIN(first + job->chunk, job->panels);
    const int64_t w_row = transposed ? 1 : out, w_col = transposed ? in : 1;
    MILI_UNUSED(scratch);
    if (MILI_OFFERS_BF16 && x->node->i[1]) mili_gemm_pack_pairs(MILI_K(x), (mil_real *)x->prepared, MILI_IN(x, 1), w_row, w_col, out, in, first, end);
    else mili_gemm_pack_panels(MILI_K(x), (mil_real *)x->prepared, MILI_IN(x, 1), w_row, w_col, out, in, first, end);
}

MILI_FN void mili_linear_prepare(const mil_exec *x)
{
    mili_pack_job job;
    job.x = x;
    job.panels = mili_gemm_panels(MILI_K(x), x->node->cols);
    job.chunk = 4;                                         // panels a task: enough work to be worth one, enough tasks to share out
    mil_exec_parallel(x, (job.panels + job.chunk - 1) / job.chunk, mili_pack_task, &job);
}

MILI_FN void mili_linear_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const int64_t in = n->input[0]->cols, out = n->cols;
    const int transposed = (int)n->i[0];
    mili_gemm g;
    memset(&g, 0, sizeof g);
    g.m = x->rows;
    g.n = out;
    g.k = in;
    g.a = MILI_IN(x, 0);
    g.a_row = in;
    g.a_col = 1;
    g.b = MILI_IN(x, 1);
    g.b_row = transposed ? 1 : out;
    g.b_col = transposed ? in : 1;
    g.packed = (const mil_real *)x->prepared;
    g.pairs = (int)n->i[1];
    g.c = MILI_OUT(x);
    g.c_row = out;
    g.bias = n->input_count > 2 ? MILI_IN(x, 2) : NULL;
    g.scratch = (mil_real *)x->scratch;
    mili_gemm_run(MILI_K(x), &g);
}

MILI_FN size_t mili_gemm_scratch_bytes(const mil_node *n)
{
    MILI_UNUSED(n);
    return (size_t)MILI_GEMM_BLOCK * sizeof(mil_real);
}
MILI_FN size_t mili_linear_scratch(const mil_node *n) { return mili_linear_prepare_bytes(n) ? 0 : mili_gemm_scratch_bytes(n); }

MILI_FN mil_node *mili_linear(mil_node *x, mil_node *w, mil_node *bias, int transposed);
MILI_FN mil_node *mili_matmul_tn(mil_node *a, mil_node *b);

#ifndef MIL_NO_TRAINING
// dx = dy W;  dW = dy^T x (or x^T dy);  db = the sum of dy's rows.
MILI_FN void mili_linear_grad(mil_node *n, mil_node *dy)
{
    mil_node *x = n->input[0], *w = n->input[1], *bias = n->input_count > 2 ? n->input[2] : NULL;
    if (mil_wants_grad(x)) mil_add_grad(x, mili_linear(dy, w, NULL, !n->i[0]));
    if (mil_wants_grad(w)) {
        int64_t flat[2];
        flat[0] = n->rows;
        flat[1] = x->cols;
        mil_node *fx = mil_reshape(x, 2, flat);
        flat[1] = n->cols;
        mil_node *fy = mil_reshape(dy, 2, flat);
        mil_add_grad(w, mil_reshape(n->i[0] ? mili_matmul_tn(fy, fx) : mili_matmul_tn(fx, fy), w->rank, w->shape));
    }
    if (mil_wants_grad(bias)) mil_add_grad(bias, mil_sum_to(dy, bias->rank, bias->shape));
}
#endif
static const mil_op mili_op_linear = { "linear", mili_linear_run, NULL, NULL, NULL, NULL, NULL, mili_linear_scratch,
                                       mili_linear_prepare_bytes, mili_linear_prepare, MILI_GRAD(mili_linear_grad), 0 };

// w is [.., r, c] with leading axes 1.
MILI_FN mil_node *mili_linear(mil_node *x, mil_node *w, mil_node *bias, int transposed)
{
    if (!mili_have(x, w, "linear")) return NULL;
    x = mili_real(x);
    w = mili_real(w);
    if (!x || !w) return NULL;
    if (w->rank < 2) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "linear: the weight %s is not [out, in]", MILI_SHAPE(w));
    const int64_t rows = w->shape[w->rank - 2], in = transposed ? w->cols : rows, out = transposed ? rows : w->cols;
    if (w->count != in * out) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "linear: the weight %s is more than one matrix", MILI_SHAPE(w));
    if (x->rank < 1 || x->cols != in)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "linear: x %s by weight %s: %lld and %lld differ", MILI_SHAPE(x), MILI_SHAPE(w),
                             (long long)(x->rank ? x->cols : 0), (long long)in);
    if (bias && bias->count != out) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "linear: weight %s and bias %s do not fit", MILI_SHAPE(w), MILI_SHAPE(bias));
    if (bias && !(bias = mil_reshape(bias, 1, &out))) return NULL;
    mil_spec s = mil_spec_make(&mili_op_linear, MIL_KIND_ROWS, x->rank, x->shape);
    s.shape[x->rank - 1] = out;
    s.input_count = bias ? 3 : 2;
    s.input[0] = x;
    s.input[1] = w;
    s.input[2] = bias;
    s.row_inputs = 1;
    s.i[0] = transposed;
    s.i[1] = x->tape->ctx->precision == MIL_PRECISION_BF16 && !MILI_IS_TRAINING(x->tape) && out > MILI_THIN;
    return mil_record(x->tape, &s);
}

MIL_DEF mil_node *mil_linear(mil_node *x, mil_node *weight, mil_node *bias)
{
    return mili_linear(x, weight, bias ? mili_real(bias) : NULL, 1);
}

// c [outer, p, q] = sum over rows of a [outer, n, p]^T b [outer, n, q]. The sum runs over the rows in order.
MILI_FN size_t mili_matmul_tn_state(const mil_node *n) { return (size_t)(n->outer ? n->count / n->outer : 0) * sizeof(mil_real); }
MILI_FN void mili_matmul_tn_begin(const mil_exec *x) { memset(x->state, 0, mili_matmul_tn_state(x->node)); }

MILI_FN void mili_matmul_tn_block(const mil_exec *x, mil_real *c, int64_t p0, int64_t p1, int64_t q0, int64_t q1, int64_t rows, int accumulate, void *scratch)
{
    const int64_t p = x->node->shape[x->node->rank - 2], q = x->node->cols;
    mili_gemm g;
    memset(&g, 0, sizeof g);
    g.m = p1 - p0;
    g.n = q1 - q0;
    g.k = rows;
    g.a = MILI_IN(x, 0) + p0;
    g.a_row = 1;
    g.a_col = p;
    g.b = MILI_IN(x, 1) + q0;
    g.b_row = q;
    g.b_col = 1;
    g.c = c + p0 * q + q0;
    g.c_row = q;
    g.accumulate = accumulate;
    g.scratch = (mil_real *)scratch;
    mili_gemm_run(MILI_K(x), &g);
}

MILI_FN void mili_matmul_tn_step(const mil_exec *x)
{
    mili_matmul_tn_block(x, (mil_real *)x->state, 0, x->node->shape[x->node->rank - 2], 0, x->node->cols, x->rows, 1, x->scratch);
}

MILI_FN void mili_matmul_tn_merge(const mil_exec *x, void *into, const void *from)
{
    MILI_K(x)->add((mil_real *)into, (mil_real *)into, (const mil_real *)from, x->node->count / x->node->outer);
}

MILI_FN void mili_matmul_tn_finish(const mil_exec *x) { memcpy(x->out, x->state, mili_matmul_tn_state(x->node)); }

// A task is a block of the result, which packs its own columns of b and of a. Blocks are as large as leaves no thread idle: of
// the ways to cut the rows, the one whose last thread is done first. An element's sum runs over the rows in order, whatever block
// it stands in.
enum { MILI_TN_COLS = 512, MILI_TN_ROWS = 48 };            // columns of a block; rows come in multiples of this

MILI_FN int64_t mili_matmul_tn_rows(const mil_exec *x)     // of a block
{
    const int64_t p = x->node->shape[x->node->rank - 2], across = (x->node->cols + MILI_TN_COLS - 1) / MILI_TN_COLS;
    const int64_t threads = x->ctx->threads;
    int64_t best = 0, best_time = 0;
    for (int64_t down = 1; down <= 2 * threads; down++) {
        const int64_t rows = MILI_MAX(1, ((p + down - 1) / down + MILI_TN_ROWS - 1) / MILI_TN_ROWS) * MILI_TN_ROWS;
        const int64_t tasks = (p + rows - 1) / rows * across, rounds = (tasks + threads - 1) / threads;
        const int64_t time = rounds * (rows + MILI_TN_ROWS);               // packing b takes about as long as 48 rows
        if (best && time >= best_time) continue;
        best = rows;
        best_time = time;
    }
    return best;
}

MILI_FN void mili_matmul_tn_task(void *arg, int64_t index, void *scratch)
{
    const mil_exec *x = (const mil_exec *)arg;
    const int64_t p = x->node->shape[x->node->rank - 2], q = x->node->cols, across = (q + MILI_TN_COLS - 1) / MILI_TN_COLS, rows = mili_matmul_tn_rows(x);
    const int64_t p0 = index / across * rows, q0 = index % across * MILI_TN_COLS;
    mili_matmul_tn_block(x, MILI_OUT(x), p0, MILI_MIN(p0 + rows, p), q0, MILI_MIN(q0 + MILI_TN_COLS, q), x->rows, x->row > 0, scratch);
}

// Deferred: a wave of rows at a time, parallel over the result.
MILI_FN void mili_matmul_tn_run(const mil_exec *x)
{
    const int64_t p = x->node->shape[x->node->rank - 2], rows = mili_matmul_tn_rows(x);
    mili_tasks(x, (p + rows - 1) / rows * ((x->node->cols + MILI_TN_COLS - 1) / MILI_TN_COLS), mili_matmul_tn_task);
}

#ifndef MIL_NO_TRAINING
// da = b dc^T;  db = a dc.
MILI_FN void mili_matmul_tn_grad(mil_node *n, mil_node *dc)
{
    mil_node *a = n->input[0], *b = n->input[1];
    if (mil_wants_grad(a)) mil_add_grad(a, mil_matmul_t(b, dc, 0, 1));
    if (mil_wants_grad(b)) mil_add_grad(b, mil_matmul_t(a, dc, 0, 0));
}
#endif
static const mil_op mili_op_matmul_tn = { "matmul_tn", mili_matmul_tn_run, mili_matmul_tn_state, mili_matmul_tn_begin, mili_matmul_tn_step, mili_matmul_tn_merge,
                                          mili_matmul_tn_finish, mili_gemm_scratch_bytes, NULL, NULL, MILI_GRAD(mili_matmul_tn_grad), MIL_OP_WAVES };

// a and b have the same leading axes and the same number of rows.
MILI_FN mil_node *mili_matmul_tn(mil_node *a, mil_node *b)
{
    if (!a || !b) return NULL;
    mil_spec s = mil_spec_make(&mili_op_matmul_tn, MIL_KIND_REDUCE, a->rank, a->shape);
    s.shape[a->rank - 2] = a->cols;
    s.shape[a->rank - 1] = b->cols;
    s.in_rows = a->shape[a->rank - 2];
    s.outer = mili_shape_count(a->rank - 2, a->shape);
    s.input_count = 2;
    s.input[0] = a;
    s.input[1] = b;
    s.row_inputs = 3;
    return mil_record(a->tape, &s);
}

// Batches: c[o] = op(a[o]) op(b[o]); i[0], i[1]: transposes. Offsets of each batch follow NumPy's broadcasting.
typedef struct mili_matmul_shape { int64_t n, m, k, batches, blocks; } mili_matmul_shape;
enum { MILI_MATMUL_BLOCK = 192 };                          // rows of the result per task

MILI_FN mili_matmul_shape mili_matmul_sizes(const mil_node *c)
{
    mili_matmul_shape s;
    const mil_node *a = c->input[0];
    s.n = c->shape[c->rank - 2];
    s.m = c->cols;
    s.k = c->i[0] ? a->shape[a->rank - 2] : a->cols;
    s.batches = mili_shape_count(c->rank - 2, c->shape);
    s.blocks = (s.n + MILI_MATMUL_BLOCK - 1) / MILI_MATMUL_BLOCK;
    return s;
}

MILI_FN int64_t mili_batch_offset(const mil_node *c, const mil_node *in, int64_t batch)
{
    int64_t offset = 0, step = in->cols * in->shape[in->rank - 2];
    for (int i = c->rank - 3; i >= 0; i--) {
        const int j = i - (c->rank - in->rank);
        const int64_t at = batch % c->shape[i];
        batch /= c->shape[i];
        if (j < 0) continue;
        if (in->shape[j] != 1) offset += at * step;
        step *= in->shape[j];
    }
    return offset;
}

MILI_FN void mili_matmul_task(void *arg, int64_t index, void *scratch)
{
    const mil_exec *x = (const mil_exec *)arg;
    const mil_node *c = x->node, *a = c->input[0], *b = c->input[1];
    const mili_matmul_shape s = mili_matmul_sizes(c);
    const int64_t batch = index / s.blocks, row = index % s.blocks * MILI_MATMUL_BLOCK;
    mili_gemm g;
    memset(&g, 0, sizeof g);
    g.m = MILI_MIN((int64_t)MILI_MATMUL_BLOCK, s.n - row);
    g.n = s.m;
    g.k = s.k;
    g.a_row = c->i[0] ? 1 : a->cols;
    g.a_col = c->i[0] ? a->cols : 1;
    g.a = MILI_IN(x, 0) + mili_batch_offset(c, a, batch) + row * g.a_row;
    g.b = MILI_IN(x, 1) + mili_batch_offset(c, b, batch);
    g.b_row = c->i[1] ? 1 : b->cols;
    g.b_col = c->i[1] ? b->cols : 1;
    g.c = MILI_OUT(x) + (batch * s.n + row) * s.m;
    g.c_row = s.m;
    g.scratch = (mil_real *)scratch;
    mili_gemm_run(MILI_K(x), &g);
}

MILI_FN void mili_matmul_run(const mil_exec *x)
{
    const mili_matmul_shape s = mili_matmul_sizes(x->node);
    mili_tasks(x, s.batches * s.blocks, mili_matmul_task);
}

#ifndef MIL_NO_TRAINING
// c = A B with A = a or a^T, B = b or b^T:  dA = dc B^T, dB = A^T dc, transposed back where needed.
MILI_FN void mili_matmul_grad(mil_node *n, mil_node *dc)
{
    mil_node *a = n->input[0], *b = n->input[1];
    const int ta = (int)n->i[0], tb = (int)n->i[1];
    if (mil_wants_grad(a)) mil_add_grad(a, mili_sum_like(ta ? mil_matmul_t(b, dc, tb, 1) : mil_matmul_t(dc, b, 0, !tb), a));
    if (mil_wants_grad(b)) mil_add_grad(b, mili_sum_like(tb ? mil_matmul_t(dc, a, 1, ta) : mil_matmul_t(a, dc, !ta, 0), b));
}
#endif
static const mil_op mili_op_matmul = { "matmul", mili_matmul_run, NULL, NULL, NULL, NULL, NULL, mili_gemm_scratch_bytes, NULL, NULL, MILI_GRAD(mili_matmul_grad), 0 };

MIL_DEF mil_node *mil_matmul_t(mil_node *a, mil_node *b, int transpose_a, int transpose_b)
{
    if (!mili_have(a, b, "matmul")) return NULL;
    a = mili_real(a);
    b = mili_real(b);
    if (!a || !b) return NULL;
    if (a->rank < 2 || b->rank < 2) return mil_tape_fail(a->tape, MIL_ERROR_SHAPE, "matmul: %s by %s: both need two axes", MILI_SHAPE(a), MILI_SHAPE(b));
    const int64_t n = transpose_a ? a->cols : a->shape[a->rank - 2], k = transpose_a ? a->shape[a->rank - 2] : a->cols;
    const int64_t m = transpose_b ? b->shape[b->rank - 2] : b->cols, k2 = transpose_b ? b->cols : b->shape[b->rank - 2];
    if (k != k2)
        return mil_tape_fail(a->tape, MIL_ERROR_SHAPE, "matmul: %s%s by %s%s: %lld and %lld differ", MILI_SHAPE(a), transpose_a ? "^T" : "",
                             MILI_SHAPE(b), transpose_b ? "^T" : "", (long long)k, (long long)k2);
    const int64_t batches_b = mili_shape_count(b->rank - 2, b->shape);
    if (!transpose_a && batches_b == 1 && b->rank <= a->rank) return mili_linear(a, b, NULL, transpose_b);

    const int rank = MILI_MAX(a->rank, b->rank);
    mil_spec s = mil_spec_make(&mili_op_matmul, MIL_KIND_WHOLE, 0, NULL);
    int same = a->rank == b->rank;
    for (int i = 0; i < rank - 2; i++) {
        const int ia = i - (rank - a->rank), ib = i - (rank - b->rank);
        const int64_t la = ia >= 0 ? a->shape[ia] : 1, lb = ib >= 0 ? b->shape[ib] : 1;
        if (la != lb && la != 1 && lb != 1) return mil_tape_fail(a->tape, MIL_ERROR_SHAPE, "matmul: %s by %s: leading axes do not broadcast", MILI_SHAPE(a), MILI_SHAPE(b));
        s.shape[i] = la == 1 ? lb : la;
        same &= la == lb;
    }
    if (transpose_a && !transpose_b && same) return mili_matmul_tn(a, b);
    s.rank = rank;
    s.shape[rank - 2] = n;
    s.shape[rank - 1] = m;
    s.input_count = 2;
    s.input[0] = a;
    s.input[1] = b;
    s.i[0] = transpose_a;
    s.i[1] = transpose_b;
    return mil_record(a->tape, &s);
}

MIL_DEF mil_node *mil_matmul(mil_node *a, mil_node *b) { return mil_matmul_t(a, b, 0, 0); }

// ---- attention pooling ----
// z[k] = sum_n p[n,k] v[n], p = softmax over n of s. State per k: the running maximum m, the sum l of exp(s - m), and
// z = sum of exp(s - m) v, rescaled whenever m grows. A row of weight 0 is skipped, so that a masked NaN spoils nothing.
typedef struct mili_pool_shape { int64_t K, E; } mili_pool_shape;

MILI_FN mili_pool_shape mili_pool_sizes(const mil_node *n)
{
    mili_pool_shape s;
    s.K = n->shape[n->rank - 2];
    s.E = n->cols;
    return s;
}

MILI_FN size_t mili_pool_state(const mil_node *n)
{
    const mili_pool_shape s = mili_pool_sizes(n);
    return (size_t)(s.K * (2 + s.E)) * sizeof(mil_real);
}

MILI_FN void mili_pool_begin(const mil_exec *x)
{
    const mili_pool_shape s = mili_pool_sizes(x->node);
    mil_real *top = (mil_real *)x->state;
    memset(x->state, 0, mili_pool_state(x->node));
    for (int64_t k = 0; k < s.K; k++) top[k] = -MILI_INF;
}

MILI_FN void mili_pool_step(const mil_exec *x)
{
    const mili_kernels *K = MILI_K(x);                     // the CPU's functions; s.K is the number of attention maps
    const mili_pool_shape s = mili_pool_sizes(x->node);
    const mil_real *scores = MILI_IN(x, 0), *values = MILI_IN(x, 1);
    mil_real *top = (mil_real *)x->state, *sum = top + s.K, *z = sum + s.K;
    for (int64_t k = 0; k < s.K; k++) {
        for (int64_t begin = 0; begin < x->rows; begin += MILI_TILE_ROWS) {          // `weight` has room for one tile; node by node all rows come at once
            const int64_t end = MILI_MIN(begin + MILI_TILE_ROWS, x->rows);
            mil_real m = top[k], weight[MILI_TILE_ROWS];
            for (int64_t r = begin; r < end; r++) {
                const mil_real v = scores[r * s.K + k];
                weight[r - begin] = v;
                if (mili_is_nan(v) || (v > m && !mili_is_nan(m))) m = v;             // a NaN becomes the maximum, and with it the result, on purpose
            }
            if (mili_is_low(m)) continue;                  // only masked rows so far
            if (m != top[k] || mili_is_nan(m)) {
                const mil_real scale = mili_is_low(top[k]) ? 0 : mili_exp(top[k] - m);
                sum[k] *= scale;
                K->scale(z + k * s.E, z + k * s.E, scale, 0, s.E);                   // z = scale z + 0
                top[k] = m;
            }
            sum[k] += K->exp_sum(weight, weight, end - begin, m);                    // from here on weight = exp(score - m)
            for (int64_t r = begin; r < end; r++)
                if (weight[r - begin] != 0) K->axpy(z + k * s.E, weight[r - begin], values + r * s.E, s.E);
        }
    }
}

MILI_FN void mili_pool_merge(const mil_exec *x, void *into, const void *from)
{
    const mili_kernels *K = MILI_K(x);
    const mili_pool_shape s = mili_pool_sizes(x->node);
    mil_real *top = (mil_real *)into, *sum = top + s.K, *z = sum + s.K;
    const mil_real *top2 = (const mil_real *)from, *sum2 = top2 + s.K, *z2 = sum2 + s.K;
    for (int64_t k = 0; k < s.K; k++) {
        if (mili_is_low(top2[k])) continue;
        if (mili_is_low(top[k])) {
            top[k] = top2[k];
            sum[k] = sum2[k];
            memcpy(z + k * s.E, z2 + k * s.E, (size_t)s.E * sizeof *z);
            continue;
        }
        const mil_real m = mili_is_nan(top2[k]) || (top2[k] > top[k] && !mili_is_nan(top[k])) ? top2[k] : top[k];
        const mil_real scale = mili_exp(top[k] - m), scale2 = mili_exp(top2[k] - m);
        sum[k] = sum[k] * scale + sum2[k] * scale2;
        K->scale(z + k * s.E, z + k * s.E, scale, 0, s.E);
        K->axpy(z + k * s.E, scale2, z2 + k * s.E, s.E);
        top[k] = m;
    }
}

// The second result is the log-sum-exp of the scores, from which the gradient gets the weights back.
MILI_FN void mili_pool_finish(const mil_exec *x)
{
    const mili_pool_shape s = mili_pool_sizes(x->node);
    const mil_real *top = (const mil_real *)x->state, *sum = top + s.K, *z = sum + s.K;
    for (int64_t k = 0; k < s.K; k++) {
        const int masked = mili_is_low(top[k]);            // no rows, or every score -inf: zeros
        MILI_K(x)->scale(MILI_OUT(x) + k * s.E, z + k * s.E, masked ? 0 : 1 / sum[k], 0, s.E);
        if (x->second) ((mil_real *)x->second)[k] = masked ? top[k] : top[k] + mili_log(sum[k]);
    }
}

#ifndef MIL_NO_TRAINING
// With p [B, N, K] the weights:  dv[n] = sum_k p[n,k] dz[k];  ds[n,k] = p[n,k] (v[n] . dz[k] - z[k] . dz[k]).
MILI_FN void mili_pool_grad(mil_node *n, mil_node *dz)
{
    mil_node *scores = n->input[0], *values = n->input[1];
    mil_node *p = mili_binary(scores, n->second, MILI_BINARY_weights, 0);            // exp(s - lse), 0 where lse is -inf
    if (mil_wants_grad(values)) mil_add_grad(values, mil_matmul(p, dz));
    if (mil_wants_grad(scores)) {
        mil_node *mean = mil_transpose(mil_sum(mil_mul(n, dz), -1));                 // z . dz [B, 1, K]
        mil_node *ds = mil_mul(p, mil_sub(mil_matmul_t(values, dz, 0, 1), mean));
        // The score of a lone instance changes nothing; the difference of two sums in different orders would say otherwise.
        mil_add_grad(scores, scores->shape[scores->rank - 2] == 1 ? mil_constant(scores->tape, scores->rank, scores->shape, 0) : ds);
    }
}
#endif
static const mil_op mili_op_softmax_pool = MILI_REDUCE_OP("softmax_pool", mili_pool_state, mili_pool_begin, mili_pool_step, mili_pool_merge, mili_pool_finish, mili_pool_grad);

MIL_DEF mil_node *mil_softmax_pool(mil_node *scores, mil_node *values)
{
    if (!mili_have(scores, values, "softmax_pool")) return NULL;
    scores = mili_real(scores);
    values = mili_real(values);
    if (!scores || !values) return NULL;
    int ok = scores->rank == values->rank && scores->rank >= 2;
    for (int i = 0; ok && i < scores->rank - 1; i++) ok = scores->shape[i] == values->shape[i];
    if (!ok || scores->shape[scores->rank - 2] < 1)
        return mil_tape_fail(scores->tape, MIL_ERROR_SHAPE, "softmax_pool: scores %s and values %s need the same instances, at least one", MILI_SHAPE(scores), MILI_SHAPE(values));
    const int r = scores->rank;
    mil_spec s = mil_spec_make(&mili_op_softmax_pool, MIL_KIND_REDUCE, r, scores->shape);
    s.outer = mili_shape_count(r - 2, scores->shape);
    s.in_rows = scores->shape[r - 2];
    s.shape[r - 2] = scores->cols;
    s.shape[r - 1] = values->cols;
    s.input_count = 2;
    s.input[0] = scores;
    s.input[1] = values;
    s.row_inputs = 3;
    mil_node *z = mil_record(scores->tape, &s);
    s.shape[r - 2] = 1;
    s.shape[r - 1] = scores->cols;
    mil_node_second(z, MIL_REAL_DTYPE, r, s.shape);
    return z;
}

// ---- layer norm ----
// y = (x - mean) / sqrt(var + eps) w + b over the last axis, biased variance.
MILI_FN void mili_row_stats(const mili_kernels *K, const mil_real *x, int64_t n, double eps, mil_real *mean, mil_real *scale)
{
    const mil_real m = K->sum(x, n) / (mil_real)n;
    mil_real sum = 0;
    for (int64_t j = 0; j < n; j++) sum += (x[j] - m) * (x[j] - m);
    *mean = m;
    *scale = 1 / mili_sqrt(sum / (mil_real)n + (mil_real)eps);
}

MILI_FN void mili_layer_norm_run(const mil_exec *x)
{
    const mili_kernels *K = MILI_K(x);
    const int64_t n = x->node->cols;
    const int affine = x->node->input_count > 1;
    for (int64_t r = 0; r < x->rows; r++) {
        const mil_real *a = MILI_IN(x, 0) + r * n;
        mil_real *y = MILI_OUT(x) + r * n, mean, scale;
        mili_row_stats(K, a, n, x->node->r[0], &mean, &scale);
        for (int64_t j = 0; j < n; j++) y[j] = (a[j] - mean) * scale;
        if (!affine) continue;
        K->mul(y, y, MILI_IN(x, 1), n);
        K->add(y, y, MILI_IN(x, 2), n);
    }
}

#ifndef MIL_NO_TRAINING
// With h = (x - mean) s and g = dy w:  dx = s (g - mean(g) - h mean(g h)).  dw = sum dy h, db = sum dy.
MILI_FN void mili_layer_norm_grad_run(const mil_exec *x)
{
    const mili_kernels *K = MILI_K(x);
    const int64_t n = x->node->cols;
    const int affine = x->node->input_count > 2;
    for (int64_t r = 0; r < x->rows; r++) {
        const mil_real *a = MILI_IN(x, 0) + r * n, *dy = MILI_IN(x, 1) + r * n, *w = affine ? MILI_IN(x, 2) : NULL;
        mil_real *dx = MILI_OUT(x) + r * n, mean, scale, sum_g = 0, sum_gh = 0;
        mili_row_stats(K, a, n, x->node->r[0], &mean, &scale);
        for (int64_t j = 0; j < n; j++) {
            const mil_real g = w ? dy[j] * w[j] : dy[j];
            dx[j] = g;
            sum_g += g;
            sum_gh += g * (a[j] - mean) * scale;
        }
        for (int64_t j = 0; j < n; j++) dx[j] = scale * (dx[j] - sum_g / (mil_real)n - (a[j] - mean) * scale * (sum_gh / (mil_real)n));
    }
}
static const mil_op mili_op_layer_norm_grad = MILI_ROWS_OP("gradient of layer_norm", mili_layer_norm_grad_run, NULL);

MILI_FN void mili_layer_norm_grad(mil_node *n, mil_node *dy)
{
    mil_node *x = n->input[0], *w = n->input_count > 1 ? n->input[1] : NULL, *b = w ? n->input[2] : NULL;
    if (mil_wants_grad(x)) {
        mil_spec s = mil_spec_make(&mili_op_layer_norm_grad, MIL_KIND_ROWS, n->rank, n->shape);
        s.input_count = w ? 3 : 2;
        s.input[0] = x;
        s.input[1] = dy;
        s.input[2] = w;
        s.row_inputs = 3;
        s.r[0] = n->r[0];
        mil_add_grad(x, mil_record(n->tape, &s));
    }
    if (mil_wants_grad(w)) mil_add_grad(w, mil_sum_to(mil_mul(dy, mil_layer_norm(x, NULL, NULL, n->r[0])), w->rank, w->shape));
    if (mil_wants_grad(b)) mil_add_grad(b, mil_sum_to(dy, b->rank, b->shape));
}
#endif
static const mil_op mili_op_layer_norm = MILI_ROWS_OP("layer_norm", mili_layer_norm_run, mili_layer_norm_grad);

MIL_DEF mil_node *mil_layer_norm(mil_node *x, mil_node *weight, mil_node *bias, double eps)
{
    x = mili_real(x);
    if (!x) return NULL;
    const int affine = weight || bias;
    if (affine && !mili_have(weight, bias, "layer_norm")) return NULL;
    if (affine) { weight = mili_real(weight); bias = mili_real(bias); }
    if (affine && (!weight || !bias)) return NULL;
    if (x->rank < 1 || x->cols < 1 || (affine && (weight->count != x->cols || bias->count != x->cols)))
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "layer_norm: x %s, weight %s, bias %s", MILI_SHAPE(x), affine ? MILI_SHAPE(weight) : "none", affine ? MILI_SHAPE(bias) : "none");
    if (affine && !((weight = mil_reshape(weight, 1, &x->cols)) && (bias = mil_reshape(bias, 1, &x->cols)))) return NULL;
    mil_spec s = mil_spec_make(&mili_op_layer_norm, MIL_KIND_ROWS, x->rank, x->shape);
    s.input_count = affine ? 3 : 1;
    s.input[0] = x;
    s.input[1] = weight;
    s.input[2] = bias;
    s.row_inputs = 1;
    s.r[0] = eps;
    return mil_record(x->tape, &s);
}

// ---- selection ----
// Whether all indices lie in 0..length-1; if not, records which one does not.
MILI_FN int mili_check_index(const mil_exec *x, const int64_t *index, int64_t count, int64_t length)
{
    for (int64_t i = 0; i < count; i++)
        if (index[i] < 0 || index[i] >= length) {
            mili_fail(x->ctx, MIL_ERROR_ARGUMENT, "%s%s%s: index %lld at %lld is outside 0..%lld", x->node->layer, x->node->layer[0] ? ": " : "",
                      x->node->op->name, (long long)index[i], (long long)i, (long long)(length - 1));
            return 0;
        }
    return 1;
}

MILI_FN void mili_gather_run(const mil_exec *x)            // y [outer, k, inner] = x [outer, index[k], inner]
{
    const mil_node *n = x->node;
    const mili_around from = mili_around_axis(n->input[0], (int)n->i[0]);
    const int64_t *index = MILI_IN_INDEX(x, 1), k = n->input[1]->count;
    const size_t size = mil_dtype_size(n->dtype), piece = (size_t)from.inner * size;
    if (!mili_check_index(x, index, k, from.n)) return;
    for (int64_t o = 0; o < from.outer; o++)
        for (int64_t i = 0; i < k; i++)
            memcpy((char *)x->out + (size_t)(o * k + i) * piece, (const char *)x->in[0] + (size_t)(o * from.n + index[i]) * piece, piece);
}

MILI_FN void mili_scatter_run(const mil_exec *x)           // y [outer, index[k], inner] += x [outer, k, inner], in the order of k
{
    const mil_node *n = x->node;
    const mili_around to = mili_around_axis(n, (int)n->i[0]);
    const int64_t *index = MILI_IN_INDEX(x, 1), k = n->input[1]->count;
    memset(x->out, 0, (size_t)n->count * sizeof(mil_real));
    if (!mili_check_index(x, index, k, to.n)) return;
    for (int64_t o = 0; o < to.outer; o++)
        for (int64_t i = 0; i < k; i++) {
            mil_real *y = MILI_OUT(x) + (o * to.n + index[i]) * to.inner;
            MILI_K(x)->add(y, y, MILI_IN(x, 0) + (o * k + i) * to.inner, to.inner);
        }
}

#ifndef MIL_NO_TRAINING
MILI_FN void mili_gather_grad(mil_node *n, mil_node *dy)
{
    const int a = (int)n->i[0];
    mil_add_grad(n->input[0], mil_scatter_add(dy, n->input[1], a, n->input[0]->shape[a]));
}
MILI_FN void mili_scatter_grad(mil_node *n, mil_node *dy) { mil_add_grad(n->input[0], mil_gather(dy, n->input[1], (int)n->i[0])); }
#endif
static const mil_op mili_op_gather = MILI_WHOLE_OP("gather", mili_gather_run, mili_gather_grad);
static const mil_op mili_op_scatter_add = MILI_WHOLE_OP("scatter_add", mili_scatter_run, mili_scatter_grad);

MIL_DEF mil_node *mil_gather(mil_node *x, mil_node *index, int axis)
{
    if (!mili_have(x, index, "gather")) return NULL;
    x = mili_either(x);
    index = mili_index(index);
    if (!x || !index) return NULL;
    const int a = mili_axis(x, axis, "gather");
    if (a < 0) return NULL;
    if (index->count != index->cols && index->rank > 0 && index->count != index->shape[0])
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "gather: the index is [k], not %s", MILI_SHAPE(index));
    mil_spec s = mil_spec_make(&mili_op_gather, MIL_KIND_WHOLE, x->rank, x->shape);
    s.dtype = x->dtype;
    s.shape[a] = index->count;
    s.input_count = 2;
    s.input[0] = x;
    s.input[1] = index;
    s.i[0] = a;
    return mil_record(x->tape, &s);
}

MIL_DEF mil_node *mil_scatter_add(mil_node *x, mil_node *index, int axis, int64_t length)
{
    if (!mili_have(x, index, "scatter_add")) return NULL;
    x = mili_real(x);
    index = mili_index(index);
    if (!x || !index) return NULL;
    const int a = mili_axis(x, axis, "scatter_add");
    if (a < 0) return NULL;
    if (index->rank != 1 || x->shape[a] != index->count || length < 0)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "scatter_add: axis %d of %s by index %s to length %lld", a, MILI_SHAPE(x), MILI_SHAPE(index), (long long)length);
    mil_spec s = mil_spec_make(&mili_op_scatter_add, MIL_KIND_WHOLE, x->rank, x->shape);
    s.shape[a] = length;
    s.input_count = 2;
    s.input[0] = x;
    s.input[1] = index;
    s.i[0] = a;
    return mil_record(x->tape, &s);
}

MILI_FN void mili_one_hot_run(const mil_exec *x)
{
    const int64_t classes = x->node->cols, *index = MILI_IN_INDEX(x, 0);
    memset(x->out, 0, (size_t)x->node->count * sizeof(mil_real));
    if (!mili_check_index(x, index, x->node->input[0]->count, classes)) return;
    for (int64_t i = 0; i < x->node->input[0]->count; i++) MILI_OUT(x)[i * classes + index[i]] = 1;
}
static const mil_op mili_op_one_hot = MILI_WHOLE_OP("one_hot", mili_one_hot_run, NULL);

MIL_DEF mil_node *mil_one_hot(mil_node *index, int64_t classes)
{
    index = mili_index(index);
    if (!index) return NULL;
    if (index->rank >= MIL_MAX_RANK || classes < 1) return mil_tape_fail(index->tape, MIL_ERROR_SHAPE, "one_hot: %s to %lld classes", MILI_SHAPE(index), (long long)classes);
    mil_spec s = mil_spec_make(&mili_op_one_hot, MIL_KIND_WHOLE, index->rank, index->shape);
    s.shape[s.rank++] = classes;
    s.input_count = 1;
    s.input[0] = index;
    return mil_record(index->tape, &s);
}

// ---- random draws ----
// The stream of a draw is the hash of its name; element e of step t is number (t, e) of it.
MILI_FN void mili_random_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const mil_tape *tape = n->tape;
    const uint64_t stream = (uint64_t)n->i[1] ^ mili_mix(tape->step);
    const uint64_t seed = tape->seed, first = (uint64_t)(x->row * n->cols);
    const int64_t count = x->rows * n->cols;
    mil_real *y = MILI_OUT(x);
    if (n->i[0]) {
        for (int64_t i = 0; i < count; i++) y[i] = (mil_real)mili_random_gauss(seed, stream, first + (uint64_t)i);
        return;
    }
    const mil_real most = (mil_real)(1 - 1.0 / 16777216);  // for what would be rounded up to 1
    for (int64_t i = 0; i < count; i++) {
        const mil_real u = (mil_real)mili_random_unit(seed, stream, first + (uint64_t)i);
        y[i] = u < 1 ? u : most;
    }
}
static const mil_op mili_op_random = { "random", mili_random_run, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, MILI_OP_SOURCE | MILI_OP_LIGHT };

MILI_FN void mili_permutation_run(const mil_exec *x)       // Fisher and Yates
{
    const mil_tape *tape = x->node->tape;
    const uint64_t stream = (uint64_t)x->node->i[1] ^ mili_mix(tape->step);
    int64_t *p = (int64_t *)x->out;
    for (int64_t i = 0; i < x->node->count; i++) p[i] = i;
    for (int64_t i = x->node->count - 1; i > 0; i--) {
        const int64_t j = (int64_t)(mili_random_bits(tape->seed, stream, (uint64_t)i) % (uint64_t)(i + 1)), t = p[i];
        p[i] = p[j];
        p[j] = t;
    }
}
static const mil_op mili_op_permutation = MILI_WHOLE_OP("permutation", mili_permutation_run, NULL);

MILI_FN int64_t mili_draw_find(const mil_tape *tape, const char *name)
{
    int64_t i = 0;
    while (i < tape->drawn_count && strcmp(tape->drawn[i].name, name) != 0) i++;
    return i;
}

MILI_FN int mili_draw_add(mil_tape *tape, const char *name)
{
    const int64_t i = tape->drawn_count;
    if (!mili_reserve(tape->ctx, (void **)&tape->drawn, &tape->drawn_capacity, i + 1, sizeof *tape->drawn)) { mili_tape_fail_ctx(tape); return 0; }
    tape->drawn[i].name = mili_arena_text(tape->ctx, &tape->arena, name);
    tape->drawn[i].times = 1;
    if (!tape->drawn[i].name) { mili_tape_fail_ctx(tape); return 0; }
    tape->drawn_count++;
    return 1;
}

// The n-th draw of the same name on a tape is called "name.n", or the next such name that is free: two draws never share values.
MILI_FN int mili_draw_name(mil_tape *tape, const char *name, char *full, size_t size)
{
    const int64_t i = mili_draw_find(tape, name);
    snprintf(full, size, "%s", name);
    if (i == tape->drawn_count) return mili_draw_add(tape, full);
    do snprintf(full, size, "%s.%lld", name, (long long)tape->drawn[i].times++); while (mili_draw_find(tape, full) < tape->drawn_count);
    return mili_draw_add(tape, full);
}

// The draw: the caller's values if there are any under this name, else a node of `op`.
MILI_FN mil_node *mili_draw_node(mil_tape *tape, const char *name, const mil_op *op, mil_kind kind, mil_dtype dtype, int gauss, int rank, const int64_t *shape, int *supplied)
{
    char full[96];
    *supplied = 0;
    if (!tape || tape->status != MIL_OK) return NULL;
    if (!name || strlen(name) > 64) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "%s: a draw needs a name of at most 64 letters", op->name);
    if (!mili_draw_name(tape, name, full, sizeof full)) return NULL;
    for (int64_t i = 0; i < tape->draw_count; i++) {
        if (strcmp(tape->draw[i].name, full) != 0) continue;
        const mil_tensor *t = &tape->draw[i].values;
        const int64_t count = mili_shape_count(rank, shape);
        if (mil_tensor_count(t) != count)
            return mil_tape_fail(tape, MIL_ERROR_SHAPE, "draw %s: %lld values where %s are drawn", full, (long long)mil_tensor_count(t), mili_shape_text(rank, shape).s);
        *supplied = 1;
        mil_node *in = mil_input(tape, full, t);
        return mil_reshape(dtype == MIL_I64 ? mili_index(in) : mili_real(in), rank, shape);
    }
    mil_spec s = mil_spec_make(op, kind, rank, shape);
    s.dtype = dtype;
    s.i[0] = gauss;
    s.i[1] = (int64_t)mili_hash_text(full);
    return mil_record(tape, &s);
}

MIL_DEF mil_node *mil_random_uniform(mil_tape *tape, const char *name, int rank, const int64_t *shape)
{
    int supplied;
    return mili_draw_node(tape, name, &mili_op_random, MIL_KIND_ROWS, MIL_REAL_DTYPE, 0, rank, shape, &supplied);
}

MIL_DEF mil_node *mil_random_normal(mil_tape *tape, const char *name, int rank, const int64_t *shape)
{
    int supplied;
    return mili_draw_node(tape, name, &mili_op_random, MIL_KIND_ROWS, MIL_REAL_DTYPE, 1, rank, shape, &supplied);
}

MIL_DEF mil_node *mil_random_permutation(mil_tape *tape, const char *name, int64_t n)
{
    int supplied;
    return mili_draw_node(tape, name, &mili_op_permutation, MIL_KIND_WHOLE, MIL_I64, 0, 1, &n, &supplied);
}

// One draw for all elements of x that an element of `shape` is broadcast to. A supplied draw is the mask itself (1 = kept); the
// library's own is uniform and compared with the rate in the kernel.
MILI_FN mil_node *mili_dropout(mil_node *x, const int64_t *shape, double rate, const char *name)
{
    if (!(rate > 0 && rate < 1)) return mil_tape_fail(x->tape, MIL_ERROR_ARGUMENT, "dropout: the rate %g is not in [0, 1)", rate);
    int supplied;
    mil_node *draw = mili_draw_node(x->tape, name, &mili_op_random, MIL_KIND_ROWS, MIL_REAL_DTYPE, 0, x->rank, shape, &supplied);
    if (!draw) return NULL;
    return supplied ? mil_affine(mil_mask_fill(x, draw, 0), 1 / (1 - rate), 0) : mili_binary(x, draw, MILI_BINARY_drop, rate);
}

MIL_DEF mil_node *mil_dropout(mil_node *x, double rate, const char *name)
{
    x = mili_real(x);
    return x && MILI_IS_TRAINING(x->tape) && rate != 0 ? mili_dropout(x, x->shape, rate, name) : x;
}

// ---- attention ----
// Scaled dot product attention per head h (columns h d .. h d + d - 1 of q and k, h e .. of v):
//   o[i] = sum_j p[i,j] v[j],   p[i,:] = softmax over j of scale <q[i], k[j]>
// Tile by tile: `queries` rows against `keys` columns, with a running maximum (Milakov and Gimelshein 2018; Dao, Fu, Ermon,
// Rudra, Re 2022), so that no [N, M] matrix exists. The second result is the log-sum-exp per query and head; from it the
// gradients get each tile of p back. How it is cut depends on the sizes alone, so that bits do not depend on threads:
//   few keys:                  row-wise in the queries, which need not exist whole
//   few queries, many keys:    a reduction over the keys, which need not exist whole
//   otherwise:                 a task is a tile of queries of one head, whose keys and values stay in cache
#define MILI_ATTENTION_QUERIES 128
#define MILI_ATTENTION_KEYS 256
#define MILI_ATTENTION_FEW 512

// i[]: heads, null keys, mask input, draw input, stream of the draw.  r[]: scale, rate.
typedef struct mili_attention {
    const mili_kernels *K;
    const mil_node *node;
    int64_t B, N, M, H, d, e, keys;                        // keys: of a tile
    int64_t first, first_key;                              // the row of [B * N], of [B * M], at which row-wise inputs begin
    int64_t null_keys;                                     // so many further keys of score 0 and value 0
    mil_real scale;
    double rate;
    const mil_real *q, *k, *v, *mask, *draw;               // [B,N,H d] [B,M,H d] [B,M,H e] [B,M] [B,H,N,M]
    const mil_real *packed;                                // k and v of each batch and head as GEMM's B, or NULL
    const mil_real *out, *dy, *lse;                        // gradients: [B,N,H e] [B,N,H e] [B,N,H]
} mili_attention;

MILI_FN int64_t mili_attention_key_tile(const mil_node *n)
{
    return n->kind == MIL_KIND_ROWS && n->row_inputs & 1 ? n->input[1]->shape[1] : MILI_ATTENTION_KEYS;
}

MILI_FN mili_attention mili_attention_open(const mil_exec *x)
{
    const mil_node *n = x->node, *q = n->input[0], *k = n->input[1], *v = n->input[2];
    mili_attention a;
    memset(&a, 0, sizeof a);
    a.K = MILI_K(x);
    a.node = n;
    a.H = n->i[0];
    a.B = q->shape[0];
    a.N = q->shape[1];
    a.M = k->shape[1];
    a.d = a.H ? q->shape[2] / a.H : 0;
    a.e = a.H ? v->shape[2] / a.H : 0;
    a.keys = mili_attention_key_tile(n);
    a.first = n->row_inputs & 1 ? x->row : 0;
    a.first_key = n->row_inputs & 2 ? x->row : 0;
    a.null_keys = n->i[1];
    a.scale = (mil_real)n->r[0];
    a.rate = n->r[1];
    a.q = MILI_IN(x, 0);
    a.k = MILI_IN(x, 1);
    a.v = MILI_IN(x, 2);
    a.mask = n->i[2] ? MILI_IN(x, n->i[2]) : NULL;
    a.draw = n->i[3] ? MILI_IN(x, n->i[3]) : NULL;
    return a;
}

// What a task works in: a tile of scaled queries, scores, and what the task adds up.
typedef struct mili_attention_scratch { mil_real *gemm, *q, *s, *t, *o, *top, *sum; } mili_attention_scratch;

MILI_FN int64_t mili_attention_scratch_reals(const mil_node *n)
{
    const int64_t d = n->input[0]->shape[2], e = n->input[2]->shape[2];        // bounds of one head's width
    const int64_t keys = mili_attention_key_tile(n);
    return MILI_GEMM_BLOCK + MILI_ATTENTION_QUERIES * (d / n->i[0] + 2 * keys + MILI_MAX(d, e) / n->i[0] + 2);
}
MILI_FN size_t mili_attention_scratch_bytes(const mil_node *n) { return (size_t)mili_attention_scratch_reals(n) * sizeof(mil_real); }

MILI_FN mili_attention_scratch mili_attention_carve(const mili_attention *a, void *scratch)
{
    mili_attention_scratch t;
    t.gemm = (mil_real *)scratch;
    t.q = t.gemm + MILI_GEMM_BLOCK;
    t.s = t.q + MILI_ATTENTION_QUERIES * a->d;
    t.t = t.s + MILI_ATTENTION_QUERIES * a->keys;
    t.o = t.t + MILI_ATTENTION_QUERIES * a->keys;
    t.top = t.o + MILI_ATTENTION_QUERIES * MILI_MAX(a->d, a->e);
    t.sum = t.top + MILI_ATTENTION_QUERIES;
    return t;
}

// c [m, n] = a b, or += with `add`; element (i, p) of a at a_row i + a_col p, of b at b_row p + b_col j.
MILI_FN void mili_product(const mili_kernels *K, int64_t m, int64_t n, int64_t k, const mil_real *a, int64_t a_row, int64_t a_col,
                          const mil_real *b, int64_t b_row, int64_t b_col, const mil_real *packed, mil_real *c, int64_t c_row, int add, mil_real *scratch)
{
    mili_gemm g;
    memset(&g, 0, sizeof g);
    g.m = m;
    g.n = n;
    g.k = k;
    g.a = a;
    g.a_row = a_row;
    g.a_col = a_col;
    g.b = b;
    g.b_row = b_row;
    g.b_col = b_col;
    g.packed = packed;
    g.c = c;
    g.c_row = c_row;
    g.accumulate = add;
    g.scratch = scratch;
    mili_gemm_run(K, &g);
}

// Row i of batch b among the queries (or their results), row j among the keys (or values), of `width` columns.
MILI_FN const mil_real *mili_attention_row(const mili_attention *a, const mil_real *x, int64_t b, int64_t i, int64_t width)
{
    return x + (b * a->N + i - a->first) * width;
}
MILI_FN const mil_real *mili_attention_key(const mili_attention *a, const mil_real *x, int64_t b, int64_t j, int64_t width)
{
    return x + (b * a->M + j - a->first_key) * width;
}

MILI_FN void mili_attention_queries(const mili_attention *a, int64_t b, int64_t h, int64_t i0, int64_t count, mil_real *dst)
{
    const int64_t width = a->H * a->d;
    const mil_real *q = mili_attention_row(a, a->q, b, i0, width) + h * a->d;
    for (int64_t r = 0; r < count; r++) a->K->scale(dst + r * a->d, q + r * width, a->scale, 0, a->d);
}

// s [count, keys] = scaled scores of keys j0 .. j0 + keys - 1; masked keys get -inf.
MILI_FN void mili_attention_scores(const mili_attention *a, int64_t b, int64_t h, const mil_real *q, int64_t count, int64_t j0, int64_t keys,
                                   const mil_real *packed, mil_real *s, mil_real *scratch)
{
    const int64_t width = a->H * a->d;
    const mil_real *k = mili_attention_key(a, a->k, b, j0, width) + h * a->d, *mask = a->mask ? mili_attention_key(a, a->mask, b, j0, 1) : NULL;
    if (count == 1) mili_product(a->K, keys, 1, a->d, k, width, 1, q, 1, a->d, NULL, s, 1, 0, scratch);       // keys as they stand
    else mili_product(a->K, count, keys, a->d, q, a->d, 1, k, 1, width, packed, s, keys, 0, scratch);
    for (int64_t j = 0; mask && j < keys; j++)
        if (mask[j] == 0) for (int64_t r = 0; r < count; r++) s[r * keys + j] = -MILI_INF;
}

// Dropout on a tile of p (or of its gradient): element (b, h, i, j) is kept by a draw of its own, made again wherever it is
// needed. Four elements share 64 random bits, so the rate is rounded to 1 / 65536.
MILI_FN void mili_attention_drop(const mili_attention *a, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t j0, int64_t keys, mil_real *p)
{
    const mil_tape *tape = a->node->tape;
    const uint64_t stream = (uint64_t)a->node->i[4] ^ mili_mix(tape->step);
    const unsigned limit = (unsigned)(a->rate * 65536 + 0.5);
    const mil_real up = (mil_real)(1 / (1 - a->rate));
    for (int64_t r = 0; r < count; r++, p += keys) {
        const int64_t row = (b * a->H + h) * a->N + i0 + r;
        if (a->draw) {
            const mil_real *kept = a->draw + row * a->M + j0;
            for (int64_t j = 0; j < keys; j++) p[j] = kept[j] != 0 ? p[j] * up : 0;
            continue;
        }
        const uint64_t first = (uint64_t)row * (uint64_t)((a->M + 3) / 4) + (uint64_t)(j0 / 4);          // j0 is a multiple of 4
        for (int64_t j = 0; j < keys; j += 4) {
            uint64_t bits = mili_random_bits(tape->seed, stream, first + (uint64_t)(j / 4));
            for (int64_t l = j; l < j + 4 && l < keys; l++, bits >>= 16) p[l] = (unsigned)(bits & 65535) >= limit ? p[l] * up : 0;
        }
    }
}

// Takes keys j0 .. j0 + keys - 1 into the running softmax of queries i0 .. i0 + count - 1 (scaled, in q): per query the maximum,
// the sum of exp(s - maximum), and o [count, e], the sum of exp(s - maximum) v.
MILI_FN void mili_attention_absorb(const mili_attention *a, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t j0, int64_t keys, const mil_real *packed_k,
                                   const mil_real *packed_v, mil_real *top, mil_real *sum, mil_real *o, const mili_attention_scratch *t)
{
    const mili_kernels *K = a->K;
    const int64_t width = a->H * a->e;
    mili_attention_scores(a, b, h, t->q, count, j0, keys, packed_k, t->s, t->gemm);
    for (int64_t r = 0; r < count; r++) {
        mil_real *s = t->s + r * keys;
        const mil_real m = K->max(s, keys);
        if (mili_is_low(m)) {                              // nothing but masked keys
            memset(s, 0, (size_t)keys * sizeof *s);
            continue;
        }
        if (mili_is_nan(m) || m > top[r]) {
            const mil_real factor = mili_is_low(top[r]) ? 0 : mili_exp(top[r] - m);
            if (sum[r] != 0) K->scale(o + r * a->e, o + r * a->e, factor, 0, a->e);
            sum[r] *= factor;
            top[r] = m;
        }
        sum[r] += K->exp_sum(s, s, keys, top[r]);
    }
    if (a->rate > 0) mili_attention_drop(a, b, h, i0, count, j0, keys, t->s);
    mili_product(K, count, a->e, keys, t->s, keys, 1, mili_attention_key(a, a->v, b, j0, width) + h * a->e, width, 1, packed_v, o, a->e, 1, t->gemm);
}

// After the last key: null keys, then out and lse of one query.
MILI_FN void mili_attention_close(const mili_attention *a, mil_real top, mil_real sum, const mil_real *o, mil_real *out, mil_real *lse)
{
    mil_real factor = 1;
    if (a->null_keys) {
        const mil_real m = top > 0 || mili_is_nan(top) ? top : 0;
        factor = mili_is_low(top) ? 0 : mili_exp(top - m);
        sum = sum * factor + (mil_real)a->null_keys * mili_exp(-m);
        top = m;
    }
    const int empty = mili_is_low(top);
    if (out) a->K->scale(out, o, empty ? 0 : factor / sum, 0, a->e);
    if (lse) *lse = empty ? top : top + mili_log(sum);
}

// Queries i0 .. i0 + count - 1 of one head: out [count, e] and lse [count], rows out_row and lse_row apart.
MILI_FN void mili_attention_tile(const mili_attention *a, int64_t b, int64_t h, int64_t i0, int64_t count, mil_real *out, int64_t out_row,
                                 mil_real *lse, int64_t lse_row, void *scratch)
{
    const mili_attention_scratch t = mili_attention_carve(a, scratch);
    const mil_real *pk = NULL, *pv = NULL;
    if (a->packed) {
        const int64_t size_k = mili_gemm_packed_count(a->K, a->M, a->d), size_v = mili_gemm_packed_count(a->K, a->e, a->M);
        pk = a->packed + (b * a->H + h) * (size_k + size_v);
        pv = pk + size_k;
    }
    mili_attention_queries(a, b, h, i0, count, t.q);
    for (int64_t r = 0; r < count; r++) {
        t.top[r] = -MILI_INF;
        t.sum[r] = 0;
    }
    memset(t.o, 0, (size_t)(count * a->e) * sizeof *t.o);
    for (int64_t j0 = 0; j0 < a->M; j0 += a->keys) mili_attention_absorb(a, b, h, i0, count, j0, MILI_MIN(a->keys, a->M - j0), pk, pv, t.top, t.sum, t.o, &t);
    for (int64_t r = 0; r < count; r++) mili_attention_close(a, t.top[r], t.sum[r], t.o + r * a->e, out + r * out_row, lse ? lse + r * lse_row : NULL);
}

typedef struct mili_attention_job { const mil_exec *x; mili_attention a; int64_t tiles; } mili_attention_job;

MILI_FN void mili_attention_task(void *arg, int64_t index, void *scratch)
{
    const mili_attention_job *job = (const mili_attention_job *)arg;
    const mili_attention *a = &job->a;
    const int64_t tile = index % job->tiles, head = index / job->tiles, b = head / a->H, h = head % a->H;
    const int64_t i0 = tile * MILI_ATTENTION_QUERIES, count = MILI_MIN(MILI_ATTENTION_QUERIES, a->N - i0), row = b * a->N + i0;
    mil_real *lse = (mil_real *)job->x->second;
    mili_attention_tile(a, b, h, i0, count, MILI_OUT(job->x) + row * a->H * a->e + h * a->e, a->H * a->e, lse ? lse + row * a->H + h : NULL, a->H, scratch);
}

// Calls `tile` for the parts of a block of rows that lie in one batch, at most one tile of queries each.
MILI_FN void mili_attention_rows(const mil_exec *x, const mili_attention *a,
                                 void (*tile)(const mil_exec *x, const mili_attention *a, int64_t b, int64_t i0, int64_t count, int64_t at))
{
    for (int64_t at = 0; at < x->rows;) {
        const int64_t row = x->row + at, b = row / a->N, i0 = row % a->N;
        const int64_t count = MILI_MIN(MILI_MIN(MILI_ATTENTION_QUERIES, a->N - i0), x->rows - at);
        tile(x, a, b, i0, count, at);
        at += count;
    }
}

MILI_FN void mili_attention_row_tile(const mil_exec *x, const mili_attention *a, int64_t b, int64_t i0, int64_t count, int64_t at)
{
    mil_real *lse = (mil_real *)x->second;
    for (int64_t h = 0; h < a->H; h++)
        mili_attention_tile(a, b, h, i0, count, MILI_OUT(x) + at * a->H * a->e + h * a->e, a->H * a->e, lse ? lse + at * a->H + h : NULL, a->H, x->scratch);
}

MILI_FN void mili_attention_run(const mil_exec *x)
{
    mili_attention_job job;
    job.x = x;
    job.a = mili_attention_open(x);
    if (x->node->kind == MIL_KIND_ROWS) {
        job.a.packed = (const mil_real *)x->prepared;
        mili_attention_rows(x, &job.a, mili_attention_row_tile);
        return;
    }
    job.tiles = (job.a.N + MILI_ATTENTION_QUERIES - 1) / MILI_ATTENTION_QUERIES;
    mil_exec_parallel(x, job.a.B * job.a.H * job.tiles, mili_attention_task, &job);
}

MILI_FN size_t mili_attention_prepare_bytes(const mil_node *n)
{
    if (n->rows < 32) return 0;
    const int64_t M = n->input[1]->shape[1], d = n->input[0]->shape[2] / n->i[0], e = n->input[2]->shape[2] / n->i[0], panel = 64;
    return (size_t)(n->shape[0] * n->i[0] * ((M + panel) * (d + panel) + (M + panel) * (e + panel))) * sizeof(mil_real);
}

MILI_FN void mili_attention_pack_task(void *arg, int64_t index, void *scratch)
{
    const mili_attention_job *job = (const mili_attention_job *)arg;
    const mili_attention *a = &job->a;
    const int64_t b = index / a->H, h = index % a->H, size_k = mili_gemm_packed_count(a->K, a->M, a->d), size_v = mili_gemm_packed_count(a->K, a->e, a->M);
    mil_real *dst = (mil_real *)job->x->prepared + index * (size_k + size_v);
    MILI_UNUSED(scratch);
    mili_gemm_pack(a->K, dst, a->k + b * a->M * a->H * a->d + h * a->d, 1, a->H * a->d, a->M, a->d);
    mili_gemm_pack(a->K, dst + size_k, a->v + b * a->M * a->H * a->e + h * a->e, a->H * a->e, 1, a->e, a->M);
}

MILI_FN void mili_attention_prepare(const mil_exec *x)
{
    mili_attention_job job;
    job.x = x;
    job.a = mili_attention_open(x);
    mil_exec_parallel(x, job.a.B * job.a.H, mili_attention_pack_task, &job);
}

// As a reduction over the keys of one bag. State: top [H, N], sum [H, N], o [H, N, e].
typedef struct mili_attention_state { mil_real *top, *sum, *o; } mili_attention_state;

MILI_FN size_t mili_attention_state_bytes(const mil_node *n) { return (size_t)(n->count + 2 * n->shape[1] * n->i[0]) * sizeof(mil_real); }

MILI_FN mili_attention_state mili_attention_state_at(const mil_node *n, const void *state)
{
    union { const void *c; void *m; } u;
    mili_attention_state s;
    u.c = state;
    s.top = (mil_real *)u.m;
    s.sum = s.top + n->shape[1] * n->i[0];
    s.o = s.sum + n->shape[1] * n->i[0];
    return s;
}

MILI_FN void mili_attention_begin(const mil_exec *x)
{
    const mili_attention_state s = mili_attention_state_at(x->node, x->state);
    memset(x->state, 0, mili_attention_state_bytes(x->node));
    for (int64_t r = 0; r < x->node->shape[1] * x->node->i[0]; r++) s.top[r] = -MILI_INF;
}

MILI_FN void mili_attention_step(const mil_exec *x)
{
    const mili_attention a = mili_attention_open(x);
    const mili_attention_state s = mili_attention_state_at(x->node, x->state);
    const mili_attention_scratch t = mili_attention_carve(&a, x->scratch);
    for (int64_t h = 0; h < a.H; h++)
        for (int64_t i0 = 0; i0 < a.N; i0 += MILI_ATTENTION_QUERIES) {
            const int64_t count = MILI_MIN(MILI_ATTENTION_QUERIES, a.N - i0), at = h * a.N + i0;
            mili_attention_queries(&a, 0, h, i0, count, t.q);
            for (int64_t j0 = 0; j0 < x->rows; j0 += a.keys)
                mili_attention_absorb(&a, 0, h, i0, count, x->row + j0, MILI_MIN(a.keys, x->rows - j0), NULL, NULL, s.top + at, s.sum + at, s.o + at * a.e, &t);
        }
}

MILI_FN void mili_attention_merge(const mil_exec *x, void *into, const void *from)
{
    const mil_node *n = x->node;
    const mili_attention_state s = mili_attention_state_at(n, into), f = mili_attention_state_at(n, from);
    const int64_t queries = n->shape[1] * n->i[0], e = queries ? n->count / queries : 0;
    for (int64_t r = 0; r < queries; r++) {
        if (mili_is_low(f.top[r])) continue;
        const mil_real m = mili_is_nan(f.top[r]) || f.top[r] > s.top[r] ? f.top[r] : s.top[r];
        const mil_real old = mili_is_low(s.top[r]) ? 0 : mili_exp(s.top[r] - m), added = mili_exp(f.top[r] - m);
        s.top[r] = m;
        s.sum[r] = s.sum[r] * old + f.sum[r] * added;
        MILI_K(x)->scale(s.o + r * e, s.o + r * e, old, 0, e);
        MILI_K(x)->axpy(s.o + r * e, added, f.o + r * e, e);
    }
}

MILI_FN void mili_attention_finish(const mil_exec *x)
{
    const mili_attention a = mili_attention_open(x);
    const mili_attention_state s = mili_attention_state_at(x->node, x->state);
    mil_real *lse = (mil_real *)x->second;
    for (int64_t h = 0; h < a.H; h++)
        for (int64_t i = 0; i < a.N; i++) {
            const int64_t at = h * a.N + i;
            mili_attention_close(&a, s.top[at], s.sum[at], s.o + at * a.e, MILI_OUT(x) + i * a.H * a.e + h * a.e, lse ? lse + i * a.H + h : NULL);
        }
}

#ifndef MIL_NO_TRAINING
// With p recomputed from the log-sum-exp, D[i] = <dy[i], o[i]> and keep the dropout's mask / (1 - rate):
//   dv = (p keep)^T dy,   ds = p (keep (dy v^T) - D),   dq = scale ds k,   dk = scale ds^T q
// One tile: s becomes p, t becomes ds.
MILI_FN void mili_attention_tile_grad(const mili_attention *a, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t j0, int64_t keys, const mili_attention_scratch *t)
{
    const mili_kernels *K = a->K;
    const int64_t width = a->H * a->e;
    const mil_real *dy = mili_attention_row(a, a->dy, b, i0, width) + h * a->e, *out = mili_attention_row(a, a->out, b, i0, width) + h * a->e;
    const mil_real *lse = mili_attention_row(a, a->lse, b, i0, a->H) + h;
    mili_attention_scores(a, b, h, t->q, count, j0, keys, NULL, t->s, t->gemm);
    mili_product(K, count, keys, a->e, dy, width, 1, mili_attention_key(a, a->v, b, j0, width) + h * a->e, 1, width, NULL, t->t, keys, 0, t->gemm);
    if (a->rate > 0) mili_attention_drop(a, b, h, i0, count, j0, keys, t->t);
    for (int64_t r = 0; r < count; r++) {
        mil_real *p = t->s + r * keys, *ds = t->t + r * keys;
        if (mili_is_low(lse[r * a->H])) memset(p, 0, (size_t)keys * sizeof *p);
        else K->exp_sum(p, p, keys, lse[r * a->H]);
        K->scale(ds, ds, 1, -K->dot(dy + r * width, out + r * width, a->e), keys);
        K->mul(ds, ds, p, keys);
    }
}

MILI_FN mili_attention mili_attention_open_grad(const mil_exec *x)
{
    mili_attention a = mili_attention_open(x);
    a.out = MILI_IN(x, 3);
    a.dy = MILI_IN(x, 4);
    a.lse = MILI_IN(x, 5);
    return a;
}

// dq [count, d] of one tile of queries.
MILI_FN void mili_attention_dq_tile(const mili_attention *a, int64_t b, int64_t h, int64_t i0, int64_t count, mil_real *dq, void *scratch)
{
    const mili_attention_scratch t = mili_attention_carve(a, scratch);
    const int64_t width = a->H * a->d;
    mili_attention_queries(a, b, h, i0, count, t.q);
    memset(t.o, 0, (size_t)(count * a->d) * sizeof *t.o);
    for (int64_t j0 = 0; j0 < a->M; j0 += a->keys) {
        const int64_t keys = MILI_MIN(a->keys, a->M - j0);
        mili_attention_tile_grad(a, b, h, i0, count, j0, keys, &t);
        mili_product(a->K, count, a->d, keys, t.t, keys, 1, mili_attention_key(a, a->k, b, j0, width) + h * a->d, width, 1, NULL, t.o, a->d, 1, t.gemm);
    }
    for (int64_t r = 0; r < count; r++) a->K->scale(dq + r * width, t.o + r * a->d, a->scale, 0, a->d);
}

MILI_FN void mili_attention_dq_row_tile(const mil_exec *x, const mili_attention *a, int64_t b, int64_t i0, int64_t count, int64_t at)
{
    for (int64_t h = 0; h < a->H; h++) mili_attention_dq_tile(a, b, h, i0, count, MILI_OUT(x) + at * a->H * a->d + h * a->d, x->scratch);
}

MILI_FN void mili_attention_dq_task(void *arg, int64_t index, void *scratch)
{
    const mili_attention_job *job = (const mili_attention_job *)arg;
    const mili_attention *a = &job->a;
    const int64_t tile = index % job->tiles, head = index / job->tiles, b = head / a->H, h = head % a->H, i0 = tile * MILI_ATTENTION_QUERIES;
    mili_attention_dq_tile(a, b, h, i0, MILI_MIN(MILI_ATTENTION_QUERIES, a->N - i0), MILI_OUT(job->x) + (b * a->N + i0) * a->H * a->d + h * a->d, scratch);
}

MILI_FN void mili_attention_dq_run(const mil_exec *x)
{
    mili_attention_job job;
    job.x = x;
    job.a = mili_attention_open_grad(x);
    job.tiles = (job.a.N + MILI_ATTENTION_QUERIES - 1) / MILI_ATTENTION_QUERIES;
    if (x->node->kind == MIL_KIND_ROWS) mili_attention_rows(x, &job.a, mili_attention_dq_row_tile);
    else mil_exec_parallel(x, job.a.B * job.a.H * job.tiles, mili_attention_dq_task, &job);
}

// dk and dv (NULL: not wanted) of one tile of keys: all queries in order.
MILI_FN void mili_attention_dkv_tile(const mili_attention *a, int64_t b, int64_t h, int64_t j0, int64_t keys, mil_real *dk, mil_real *dv, void *scratch)
{
    const mili_attention_scratch t = mili_attention_carve(a, scratch);
    const int64_t wk = a->H * a->d, wv = a->H * a->e;
    for (int64_t j = 0; j < keys; j++) {
        memset(dk + j * wk, 0, (size_t)a->d * sizeof *dk);
        if (dv) memset(dv + j * wv, 0, (size_t)a->e * sizeof *dv);
    }
    for (int64_t i0 = 0; i0 < a->N; i0 += MILI_ATTENTION_QUERIES) {
        const int64_t count = MILI_MIN(MILI_ATTENTION_QUERIES, a->N - i0);
        mili_attention_queries(a, b, h, i0, count, t.q);
        mili_attention_tile_grad(a, b, h, i0, count, j0, keys, &t);
        mili_product(a->K, keys, a->d, count, t.t, 1, keys, t.q, a->d, 1, NULL, dk, wk, 1, t.gemm);
        if (!dv) continue;
        if (a->rate > 0) mili_attention_drop(a, b, h, i0, count, j0, keys, t.s);
        mili_product(a->K, keys, a->e, count, t.s, 1, keys, mili_attention_row(a, a->dy, b, i0, wv) + h * a->e, wv, 1, NULL, dv, wv, 1, t.gemm);
    }
}

MILI_FN void mili_attention_dkv_task(void *arg, int64_t index, void *scratch)
{
    const mili_attention_job *job = (const mili_attention_job *)arg;
    const mili_attention *a = &job->a;
    const int64_t tile = index % job->tiles, head = index / job->tiles, b = head / a->H, h = head % a->H, j0 = tile * a->keys, row = b * a->M + j0;
    mil_real *dv = (mil_real *)job->x->second;
    mili_attention_dkv_tile(a, b, h, j0, MILI_MIN(a->keys, a->M - j0), MILI_OUT(job->x) + row * a->H * a->d + h * a->d,
                            dv ? dv + row * a->H * a->e + h * a->e : NULL, scratch);
}

MILI_FN void mili_attention_dkv_run(const mil_exec *x)
{
    mili_attention_job job;
    job.x = x;
    job.a = mili_attention_open_grad(x);
    if (x->node->kind == MIL_KIND_ROWS) {                  // of one bag
        const mili_attention *a = &job.a;
        mil_real *dv = (mil_real *)x->second;
        for (int64_t at = 0; at < x->rows; at += a->keys)
            for (int64_t h = 0; h < a->H; h++)
                mili_attention_dkv_tile(a, 0, h, x->row + at, MILI_MIN(a->keys, x->rows - at), MILI_OUT(x) + at * a->H * a->d + h * a->d,
                                        dv ? dv + at * a->H * a->e + h * a->e : NULL, x->scratch);
        return;
    }
    job.tiles = (job.a.M + job.a.keys - 1) / job.a.keys;
    mil_exec_parallel(x, job.a.B * job.a.H * job.tiles, mili_attention_dkv_task, &job);
}

static const mil_op mili_op_attention_dq = { "gradient of attention by q", mili_attention_dq_run, NULL, NULL, NULL, NULL, NULL, mili_attention_scratch_bytes, NULL, NULL, NULL, 0 };
static const mil_op mili_op_attention_dkv = { "gradient of attention by k and v", mili_attention_dkv_run, NULL, NULL, NULL, NULL, NULL, mili_attention_scratch_bytes, NULL, NULL, NULL, 0 };

MILI_FN void mili_attention_grad(mil_node *n, mil_node *dy)
{
    mil_node *q = n->input[0], *k = n->input[1], *v = n->input[2];
    const int over_keys = n->kind == MIL_KIND_REDUCE;
    mil_spec s = mil_spec_make(&mili_op_attention_dq, over_keys ? MIL_KIND_WHOLE : n->kind, 3, q->shape);
    s.input_count = 6;
    for (int i = 0; i < 3; i++) s.input[i] = n->input[i];
    s.input[3] = n;
    s.input[4] = dy;
    s.input[5] = n->second;
    memcpy(s.i, n->i, sizeof s.i);
    memcpy(s.r, n->r, sizeof s.r);
    for (int i = 2; i < 4; i++)
        if (n->i[i]) {                                     // mask and draw
            s.i[i] = s.input_count;
            s.input[s.input_count++] = n->input[n->i[i]];
        }
    s.row_inputs = n->kind == MIL_KIND_ROWS ? 1u | 7u << 3 : 0;        // queries, results
    if (mil_wants_grad(q)) mil_add_grad(q, mil_record(n->tape, &s));
    if (!mil_wants_grad(k) && !mil_wants_grad(v)) return;
    s.op = &mili_op_attention_dkv;
    s.kind = over_keys ? MIL_KIND_ROWS : MIL_KIND_WHOLE;
    s.row_inputs = over_keys ? 6u | (s.i[2] ? 1u << s.i[2] : 0) : 0;         // keys, values, their mask
    for (int a = 0; a < 3; a++) s.shape[a] = k->shape[a];
    mil_node *dk = mil_record(n->tape, &s), *dv = mil_node_second(dk, MIL_REAL_DTYPE, 3, v->shape);
    mil_add_grad(k, dk);
    mil_add_grad(v, dv);
}
#endif
static const mil_op mili_op_attention = { "attention", mili_attention_run, NULL, NULL, NULL, NULL, NULL, mili_attention_scratch_bytes, mili_attention_prepare_bytes,
                                          mili_attention_prepare, MILI_GRAD(mili_attention_grad), 0 };

static const mil_op mili_op_attention_keys = { "attention_keys", NULL, mili_attention_state_bytes, mili_attention_begin, mili_attention_step, mili_attention_merge,
                                               mili_attention_finish, mili_attention_scratch_bytes, NULL, NULL, MILI_GRAD(mili_attention_grad), 0 };

// q [B, N, H d], k [B, M, H d] (and v [B, M, H e]), mask [B, M]: NULL, or what does not fit.
MILI_FN const char *mili_attention_misfit(const mil_node *q, const mil_node *k, const mil_node *v, const mil_node *mask, int64_t heads)
{
    if (q->rank != 3 || k->rank != 3 || v->rank != 3) return "q, k and v are [B, N, H d]";
    if (heads < 1 || q->shape[2] % heads || v->shape[2] % heads) return "the widths are not a multiple of the heads";
    if (q->shape[0] != k->shape[0] || k->shape[0] != v->shape[0] || k->shape[1] != v->shape[1] || q->shape[2] != k->shape[2]) return "they do not fit each other";
    if (mask && mask->count != k->shape[0] * k->shape[1]) return "the mask is [B, M]";
    return NULL;
}

MILI_FN mil_node *mili_attention_record(mil_node *q, mil_node *k, mil_node *v, int64_t heads, double scale, mil_node *key_mask, int64_t null_keys, double dropout, const char *draw)
{
    const int masked = key_mask != NULL;
    q = mili_real(q);
    k = mili_real(k);
    v = mili_real(v);
    if (!q || !k || !v) return NULL;
    mil_tape *tape = q->tape;
    if (masked && !(key_mask = mili_real(key_mask))) return NULL;
    const char *misfit = mili_attention_misfit(q, k, v, key_mask, heads);
    if (!misfit && null_keys < 0) misfit = "null_keys is negative";
    if (misfit) return mil_tape_fail(tape, MIL_ERROR_SHAPE, "attention: q %s, k %s, v %s, %lld heads: %s", MILI_SHAPE(q), MILI_SHAPE(k), MILI_SHAPE(v), (long long)heads, misfit);
    if (!(dropout >= 0 && dropout < 1)) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "attention: the rate %g is not in [0, 1)", dropout);
    const int64_t N = q->shape[1], M = k->shape[1];
    const int over_keys = M > MILI_ATTENTION_FEW && N <= MILI_ATTENTION_FEW && q->shape[0] == 1;
    const int by_rows = M <= MILI_ATTENTION_FEW;
    mil_spec s = mil_spec_make(over_keys ? &mili_op_attention_keys : &mili_op_attention, over_keys ? MIL_KIND_REDUCE : by_rows ? MIL_KIND_ROWS : MIL_KIND_WHOLE, 3, q->shape);
    s.shape[2] = v->shape[2];
    s.outer = 1;
    s.in_rows = M;
    s.input_count = 3;
    s.input[0] = q;
    s.input[1] = k;
    s.input[2] = v;
    s.row_inputs = over_keys ? 6 : s.kind == MIL_KIND_ROWS;
    s.i[0] = heads;
    s.i[1] = null_keys;
    s.r[0] = scale != 0 ? scale : 1 / sqrt((double)MILI_MAX(q->shape[2] / heads, 1));
    if (masked) {
        if (over_keys) s.row_inputs |= 1u << s.input_count;
        s.i[2] = s.input_count;
        s.input[s.input_count++] = key_mask;
    }
    if (MILI_IS_TRAINING(tape) && dropout > 0) {
        int64_t all[4];
        int supplied;
        all[0] = q->shape[0];
        all[1] = heads;
        all[2] = q->shape[1];
        all[3] = M;
        mil_node *d = mili_draw_node(tape, draw, &mili_op_random, MIL_KIND_ROWS, MIL_REAL_DTYPE, 0, 4, all, &supplied);
        if (!d) return NULL;
        s.r[1] = dropout;
        s.i[4] = d->i[1];                                  // the library's own draw is made in the kernel: its node is never needed
        if (supplied) {
            s.i[3] = s.input_count;
            s.input[s.input_count++] = d;
        }
    }
    mil_node *n = mil_record(tape, &s);
    s.shape[2] = heads;
    mil_node_second(n, MIL_REAL_DTYPE, 3, s.shape);
    return n;
}

MIL_DEF mil_node *mil_attention(mil_node *q, mil_node *k, mil_node *v, int64_t heads, double scale, mil_node *key_mask, double dropout, const char *draw)
{
    return mili_attention_record(q, k, v, heads, scale, key_mask, 0, dropout, draw);
}

// The probabilities themselves, averaged over heads: y [B, n, M]. Inputs q, k, then q's log-sum-exp as attention left it.
MILI_FN void mili_attention_weights_task(void *arg, int64_t index, void *scratch)
{
    const mili_attention_job *job = (const mili_attention_job *)arg;
    const mili_attention *a = &job->a;
    const mili_attention_scratch t = mili_attention_carve(a, scratch);
    const int64_t tile = index % job->tiles, b = index / job->tiles, i0 = tile * MILI_ATTENTION_QUERIES, count = MILI_MIN(MILI_ATTENTION_QUERIES, a->N - i0);
    const mil_real share = 1 / (mil_real)a->H;
    mil_real *y = MILI_OUT(job->x) + (b * a->N + i0) * a->M;
    memset(y, 0, (size_t)(count * a->M) * sizeof *y);
    for (int64_t h = 0; h < a->H; h++) {
        const mil_real *lse = a->lse + (b * a->N + i0) * a->H + h;
        mili_attention_queries(a, b, h, i0, count, t.q);
        for (int64_t j0 = 0; j0 < a->M; j0 += a->keys) {
            const int64_t keys = MILI_MIN(a->keys, a->M - j0);
            mili_attention_scores(a, b, h, t.q, count, j0, keys, NULL, t.s, t.gemm);
            for (int64_t r = 0; r < count; r++) {
                if (mili_is_low(lse[r * a->H])) continue;
                a->K->exp_sum(t.s + r * keys, t.s + r * keys, keys, lse[r * a->H]);
                a->K->axpy(y + r * a->M + j0, share, t.s + r * keys, keys);
            }
        }
    }
}

MILI_FN void mili_attention_weights_run(const mil_exec *x)
{
    mili_attention_job job;
    job.x = x;
    job.a = mili_attention_open(x);
    job.a.lse = MILI_IN(x, 3);
    job.tiles = (job.a.N + MILI_ATTENTION_QUERIES - 1) / MILI_ATTENTION_QUERIES;
    mil_exec_parallel(x, job.a.B * job.tiles, mili_attention_weights_task, &job);
}
static const mil_op mili_op_attention_weights = { "attention_weights", mili_attention_weights_run, NULL, NULL, NULL, NULL, NULL, mili_attention_scratch_bytes, NULL, NULL, NULL, MIL_OP_STOPS_GRADIENT };

MIL_DEF mil_node *mil_attention_weights(mil_node *attention, int64_t first, int64_t count)
{
    if (!attention) return NULL;
    mil_tape *tape = attention->tape;
    if (attention->op != &mili_op_attention && attention->op != &mili_op_attention_keys) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "attention_weights: of %s, which is no attention", attention->op->name);
    mil_node *q = mil_slice(attention->input[0], 1, first, count), *k = attention->input[1], *lse = mil_slice(attention->second, 1, first, count);
    if (!q || !lse) return NULL;
    mil_spec s = mil_spec_make(&mili_op_attention_weights, MIL_KIND_WHOLE, 3, q->shape);
    s.shape[2] = k->shape[1];
    s.input_count = 4;
    s.input[0] = q;
    s.input[1] = k;
    s.input[2] = k;                                        // where attention has its values; not read
    s.input[3] = lse;
    s.i[0] = attention->i[0];
    s.r[0] = attention->r[0];
    if (attention->i[2]) {
        s.i[2] = s.input_count;
        s.input[s.input_count++] = attention->input[attention->i[2]];
    }
    return mil_record(tape, &s);
}

// ---- when a value is computed ----
// A row-wise value is computed as early as it can be, and stored whole if somebody reads it in a later stage. mili_after gives the
// same rows anew once `before` is complete, so that what is made of them there streams: a leaf's rows and stored rows are
// read again, a layer norm is computed again. While training values are kept for the backward pass anyway: x itself.
MILI_FN void mili_later_run(const mil_exec *x) { memcpy(x->out, x->in[0], (size_t)(x->rows * x->node->cols) * sizeof(mil_real)); }
#ifndef MIL_NO_TRAINING
MILI_FN void mili_later_grad(mil_node *n, mil_node *dy) { mil_add_grad(n->input[0], dy); }
#endif
static const mil_op mili_op_later = MILI_ROWS_OP("later", mili_later_run, mili_later_grad);

MILI_FN mil_node *mili_after(mil_node *x, mil_node *before)
{
    x = mili_real(x);
    if (!x || !before || MILI_IS_TRAINING(x->tape)) return x;
    const int again = x->op == &mili_op_layer_norm, twice = x->op == &mili_op_later && x->input_count < MIL_MAX_INPUTS;
    mil_spec s = mil_spec_make(&mili_op_later, MIL_KIND_ROWS, x->rank, x->shape);
    s.input_count = 2;
    s.input[0] = again || twice ? x->input[0] : x;
    s.input[1] = before;
    for (int i = 1; twice && i < x->input_count; i++) s.input[s.input_count++] = x->input[i];
    s.row_inputs = 1;
    mil_node *y = mil_record(x->tape, &s);
    if (!again || !y) return y;
    s.op = x->op;
    s.input_count = x->input_count;
    s.input[0] = y;
    for (int i = 1; i < x->input_count; i++) s.input[i] = x->input[i];
    s.r[0] = x->r[0];
    return mil_record(x->tape, &s);
}

// The first rows of x [B, n, E]; of a layer norm those of its input, so that it need not exist whole.
MILI_FN mil_node *mili_first_rows(mil_node *x, int64_t rows)
{
    if (!x || x->shape[1] == rows) return x;
    if (x->op != &mili_op_layer_norm) return mil_slice(x, 1, 0, rows);
    return mil_layer_norm(mil_slice(x->input[0], 1, 0, rows), x->input_count > 1 ? x->input[1] : NULL, x->input_count > 1 ? x->input[2] : NULL, x->r[0]);
}

// ---- runs of rows ----
// y [B, m, C]: the means of m equal runs of rows of x [B, n, C], after `before` rows of zeros: run j holds rows
// j l - before .. j l - before + l - 1, l = (before + n) / m.  (Nystrom attention's landmarks.)
// A reduction over the rows of one bag; with several, whole.
MILI_FN int64_t mili_run_length(const mil_node *n) { return (n->i[0] + n->input[0]->shape[1]) / n->shape[1]; }

// Adds rows first .. first + rows - 1 of a bag (x at the first) to its runs begin .. end - 1.
MILI_FN void mili_run_mean_add(const mil_exec *x, mil_real *y, const mil_real *in, int64_t first, int64_t rows, int64_t begin, int64_t end)
{
    const int64_t C = x->node->shape[2], l = mili_run_length(x->node), before = x->node->i[0];
    for (int64_t run = begin; run < end; run++)
        for (int64_t i = MILI_MAX(run * l - before, first); i < MILI_MIN((run + 1) * l - before, first + rows); i++)
            MILI_K(x)->add(y + run * C, y + run * C, in + (i - first) * C, C);
}

MILI_FN size_t mili_run_mean_state(const mil_node *n) { return (size_t)(n->outer ? n->count / n->outer : 0) * sizeof(mil_real); }
MILI_FN void mili_run_mean_begin(const mil_exec *x) { memset(x->state, 0, mili_run_mean_state(x->node)); }
MILI_FN void mili_run_mean_step(const mil_exec *x)
{
    const int64_t l = mili_run_length(x->node), before = x->node->i[0];
    mili_run_mean_add(x, (mil_real *)x->state, MILI_IN(x, 0), x->row, x->rows, (x->row + before) / l, (x->row + x->rows + before + l - 1) / l);
}
MILI_FN void mili_run_mean_merge(const mil_exec *x, void *into, const void *from)
{
    MILI_K(x)->add((mil_real *)into, (mil_real *)into, (const mil_real *)from, x->node->shape[1] * x->node->shape[2]);
}
MILI_FN void mili_run_mean_finish(const mil_exec *x)
{
    MILI_K(x)->scale(MILI_OUT(x), (const mil_real *)x->state, 1 / (mil_real)mili_run_length(x->node), 0, x->node->shape[1] * x->node->shape[2]);
}

// Deferred: a wave of rows at a time, parallel over the runs in it; a run is divided after its last row.
MILI_FN void mili_run_mean_body(const mil_exec *x, int64_t begin, int64_t end)
{
    const int64_t C = x->node->shape[2], l = mili_run_length(x->node), before = x->node->i[0], first = (x->row + before) / l;
    for (int64_t run = first + begin; run < first + end; run++) {
        mili_run_mean_add(x, MILI_OUT(x), MILI_IN(x, 0), x->row, x->rows, run, run + 1);
        if ((run + 1) * l - before <= x->row + x->rows) MILI_K(x)->scale(MILI_OUT(x) + run * C, MILI_OUT(x) + run * C, 1 / (mil_real)l, 0, C);
    }
}
MILI_FN void mili_run_mean_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const int64_t l = mili_run_length(n), before = n->i[0];
    if (x->row == 0) memset(x->out, 0, (size_t)n->count * sizeof(mil_real));
    mili_for(x, (x->row + x->rows + before + l - 1) / l - (x->row + before) / l, n->shape[2] * l, mili_run_mean_body);
}

#ifndef MIL_NO_TRAINING
MILI_FN void mili_run_mean_grad_run(const mil_exec *x)     // row i gets dy of its run / l
{
    const mil_node *n = x->node;
    const int64_t rows = n->shape[1], C = n->shape[2], m = n->input[0]->shape[1], before = n->i[0], l = (before + rows) / m;
    for (int64_t r = 0; r < x->rows; r++) {
        const int64_t b = (x->row + r) / rows, i = (x->row + r) % rows;
        MILI_K(x)->scale(MILI_OUT(x) + r * C, MILI_IN(x, 0) + (b * m + (i + before) / l) * C, 1 / (mil_real)l, 0, C);
    }
}
static const mil_op mili_op_run_mean_grad = MILI_ROWS_OP("gradient of run_mean", mili_run_mean_grad_run, NULL);

MILI_FN void mili_run_mean_grad(mil_node *n, mil_node *dy)
{
    mil_spec s = mil_spec_make(&mili_op_run_mean_grad, MIL_KIND_ROWS, 3, n->input[0]->shape);
    s.input_count = 1;
    s.input[0] = dy;
    s.i[0] = n->i[0];
    mil_add_grad(n->input[0], mili_record(n->tape, &s));
}
#endif
static const mil_op mili_op_run_mean = { "run_mean", mili_run_mean_run, mili_run_mean_state, mili_run_mean_begin, mili_run_mean_step, mili_run_mean_merge,
                                         mili_run_mean_finish, NULL, NULL, NULL, MILI_GRAD(mili_run_mean_grad), MIL_OP_WAVES };

MIL_DEF mil_node *mil_run_mean(mil_node *x, int64_t runs, int64_t before)
{
    x = mili_real(x);
    if (!x) return NULL;
    if (x->rank != 3 || runs < 1 || before < 0 || before > INT64_MAX / 16 || before + x->shape[1] < runs || (before + x->shape[1]) % runs)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "run_mean: %lld runs of %s after %lld zeros", (long long)runs, MILI_SHAPE(x), (long long)before);
    mil_spec s = mil_spec_make(&mili_op_run_mean, MIL_KIND_REDUCE, 3, x->shape);
    s.outer = x->shape[0];
    s.in_rows = x->shape[1];
    s.row_inputs = 1;
    s.shape[1] = runs;
    s.input_count = 1;
    s.input[0] = x;
    s.i[0] = before;
    return mil_record(x->tape, &s);
}

// y = a I - x on the last two axes.
MILI_FN void mili_identity_minus_run(const mil_exec *x)
{
    const int64_t n = x->node->cols;
    MILI_K(x)->scale(MILI_OUT(x), MILI_IN(x, 0), -1, 0, x->rows * n);
    for (int64_t r = 0; r < x->rows; r++) MILI_OUT(x)[r * n + (x->row + r) % n] += (mil_real)x->node->r[0];
}
#ifndef MIL_NO_TRAINING
MILI_FN void mili_identity_minus_grad(mil_node *n, mil_node *dy) { mil_add_grad(n->input[0], mil_affine(dy, -1, 0)); }
#endif
static const mil_op mili_op_identity_minus = MILI_ROWS_OP("identity_minus", mili_identity_minus_run, mili_identity_minus_grad);

MIL_DEF mil_node *mil_identity_minus(mil_node *x, double a)
{
    x = mili_real(x);
    if (!x) return NULL;
    if (x->rank < 2 || x->shape[x->rank - 2] != x->cols) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "identity_minus: %s is not square", MILI_SHAPE(x));
    mil_spec s = mil_spec_make(&mili_op_identity_minus, MIL_KIND_ROWS, x->rank, x->shape);
    s.input_count = 1;
    s.input[0] = x;
    s.row_inputs = 1;
    s.r[0] = a;
    return mil_record(x->tape, &s);
}

// ---- depth-wise convolution, channels last ----
// x [I, s + H W, C], weight [G, 1, kh, kw], bias [G] or none; same size as x, zeros outside the H x W grid of tokens:
//   y[i,(t,u),c] = bias[g] + sum_{a,b} weight[g,a,b] x[i,(t + a - before_h, u + b - before_w),c]
// The first s tokens of each image (a class token) are no part of the grid: y is 0 there.
// Filter g serves the channels g C / G .. (g + 1) C / G - 1, or with `by_image` the images i = g, g + G, ...
// Row-wise in the result, which need not exist whole; x must.
// i[]: before_h, before_w, flip, by_image, s, W. flip: x is read at t - a + before_h instead, which is the gradient by x.
#define MILI_CONV_CHANNELS 128                             // worked on at a time: their weights stay in the L1 cache

typedef struct mili_conv { int64_t images, T, H, W, C, G, kh, kw, taps, before_h, before_w, skip; int flip, by_image; } mili_conv;

MILI_FN mili_conv mili_conv_sizes(const mil_node *n, const mil_node *x, const mil_node *w)
{
    mili_conv c;
    c.skip = n->i[4];
    c.W = n->i[5];
    c.images = x->shape[0];
    c.T = x->shape[1];                                     // tokens of an image
    c.H = c.W ? (c.T - c.skip) / c.W : 0;
    c.C = x->shape[2];
    c.G = w->shape[0];
    c.kh = w->shape[2];
    c.kw = w->shape[3];
    c.taps = c.kh * c.kw;
    c.before_h = n->i[0];
    c.before_w = n->i[1];
    c.flip = (int)n->i[2];
    c.by_image = (int)n->i[3];
    return c;
}

MILI_FN size_t mili_conv_prepare_bytes(const mil_node *n)  // weights as [taps, C]
{
    const mil_node *w = n->input[1];
    return n->i[3] ? 0 : (size_t)(w->shape[2] * w->shape[3] * n->shape[2]) * sizeof(mil_real);
}

MILI_FN void mili_conv_prepare(const mil_exec *x)
{
    const mili_conv c = mili_conv_sizes(x->node, x->node->input[0], x->node->input[1]);
    for (int64_t tap = 0; tap < c.taps; tap++)
        for (int64_t j = 0; j < c.C; j++) ((mil_real *)x->prepared)[tap * c.C + j] = MILI_IN(x, 1)[j / (c.C / c.G) * c.taps + tap];
}

// One token, channels c0 .. c0 + width - 1.
MILI_FN void mili_conv_token(const mil_exec *x, const mili_conv *c, mil_real *y, int64_t row, int64_t c0, int64_t width)
{
    const mil_real *weight = MILI_IN(x, 1), *bias = x->node->input_count > 2 ? MILI_IN(x, 2) : NULL, *by_tap = (const mil_real *)x->prepared;
    const int64_t image = row / c->T, token = row % c->T - c->skip, t = token / c->W, u = token % c->W;
    const mil_real *in = MILI_IN(x, 0) + (image * c->T + c->skip) * c->C + c0;
    memset(y, 0, (size_t)width * sizeof *y);
    if (token < 0) return;
    if (bias) for (int64_t j = 0; j < width; j++) y[j] = bias[c->by_image ? image % c->G : (c0 + j) / (c->C / c->G)];
    for (int64_t a = 0; a < c->kh; a++) {
        const int64_t h = c->flip ? t - a + c->before_h : t + a - c->before_h;
        if (h < 0 || h >= c->H) continue;
        for (int64_t b = 0; b < c->kw; b++) {
            const int64_t w = c->flip ? u - b + c->before_w : u + b - c->before_w, tap = a * c->kw + b;
            if (w < 0 || w >= c->W) continue;
            if (c->by_image) MILI_K(x)->axpy(y, weight[image % c->G * c->taps + tap], in + (h * c->W + w) * c->C, width);
            else MILI_K(x)->mul_add(y, in + (h * c->W + w) * c->C, by_tap + tap * c->C + c0, width);
        }
    }
}

MILI_FN void mili_conv_run(const mil_exec *x)
{
    const mili_conv c = mili_conv_sizes(x->node, x->node->input[0], x->node->input[1]);
    for (int64_t c0 = 0; c0 < c.C; c0 += MILI_CONV_CHANNELS)
        for (int64_t r = 0; r < x->rows; r++)
            mili_conv_token(x, &c, MILI_OUT(x) + r * c.C + c0, x->row + r, c0, MILI_MIN(MILI_CONV_CHANNELS, c.C - c0));
}

#ifndef MIL_NO_TRAINING
// dweight[g,a,b] = sum of dy[t,u] x[t + a - before_h, u + b - before_w], dbias[g] = sum of dy: the second result.
// A task is a block of channels, or one filter; it goes through all positions in order.
MILI_FN size_t mili_conv_dw_scratch(const mil_node *n)
{
    return (size_t)((n->shape[2] * n->shape[3] + 1) * MILI_CONV_CHANNELS) * sizeof(mil_real);
}

// Adds up images first, first + step, ... for channels c0 .. c0 + width - 1 into acc [taps + 1, MILI_CONV_CHANNELS].
MILI_FN void mili_conv_correlate(const mil_exec *x, const mili_conv *c, int64_t first, int64_t step, int64_t c0, int64_t width, mil_real *acc)
{
    const mili_kernels *K = MILI_K(x);
    memset(acc, 0, (size_t)((c->taps + 1) * MILI_CONV_CHANNELS) * sizeof *acc);
    for (int64_t image = first; image < c->images; image += step) {
        const int64_t start = (image * c->T + c->skip) * c->C + c0;
        for (int64_t t = 0; t < c->H; t++)
            for (int64_t u = 0; u < c->W; u++) {
                const mil_real *dy = MILI_IN(x, 1) + start + (t * c->W + u) * c->C;
                K->add(acc + c->taps * MILI_CONV_CHANNELS, acc + c->taps * MILI_CONV_CHANNELS, dy, width);
                for (int64_t a = 0; a < c->kh; a++) {
                    const int64_t h = t + a - c->before_h;
                    if (h < 0 || h >= c->H) continue;
                    for (int64_t b = 0; b < c->kw; b++) {
                        const int64_t w = u + b - c->before_w;
                        if (w < 0 || w >= c->W) continue;
                        K->mul_add(acc + (a * c->kw + b) * MILI_CONV_CHANNELS, dy, MILI_IN(x, 0) + start + (h * c->W + w) * c->C, width);
                    }
                }
            }
    }
}

MILI_FN void mili_conv_dw_task(void *arg, int64_t index, void *scratch)
{
    const mil_exec *x = (const mil_exec *)arg;
    const mili_conv c = mili_conv_sizes(x->node, x->node->input[0], x->node);
    mil_real *acc = (mil_real *)scratch, *dw = MILI_OUT(x), *db = (mil_real *)x->second;
    if (c.G == c.C && !c.by_image) {
        const int64_t c0 = index * MILI_CONV_CHANNELS, width = MILI_MIN(MILI_CONV_CHANNELS, c.C - c0);
        mili_conv_correlate(x, &c, 0, 1, c0, width, acc);
        for (int64_t j = 0; j < width; j++) {
            for (int64_t tap = 0; tap < c.taps; tap++) dw[(c0 + j) * c.taps + tap] = acc[tap * MILI_CONV_CHANNELS + j];
            if (db) db[c0 + j] = acc[c.taps * MILI_CONV_CHANNELS + j];
        }
        return;
    }
    const int64_t begin = c.by_image ? 0 : index * (c.C / c.G), end = c.by_image ? c.C : begin + c.C / c.G;
    memset(dw + index * c.taps, 0, (size_t)c.taps * sizeof *dw);
    if (db) db[index] = 0;
    for (int64_t c0 = begin; c0 < end; c0 += MILI_CONV_CHANNELS) {
        const int64_t width = MILI_MIN(MILI_CONV_CHANNELS, end - c0);
        mili_conv_correlate(x, &c, c.by_image ? index : 0, c.by_image ? c.G : 1, c0, width, acc);
        for (int64_t tap = 0; tap < c.taps; tap++) dw[index * c.taps + tap] += MILI_K(x)->sum(acc + tap * MILI_CONV_CHANNELS, width);
        if (db) db[index] += MILI_K(x)->sum(acc + c.taps * MILI_CONV_CHANNELS, width);
    }
}

MILI_FN void mili_conv_dw_run(const mil_exec *x)
{
    const mili_conv c = mili_conv_sizes(x->node, x->node->input[0], x->node);
    mili_tasks(x, c.G == c.C && !c.by_image ? (c.C + MILI_CONV_CHANNELS - 1) / MILI_CONV_CHANNELS : c.G, mili_conv_dw_task);
}
static const mil_op mili_op_conv_dw = { "gradient of conv by its weight", mili_conv_dw_run, NULL, NULL, NULL, NULL, NULL, mili_conv_dw_scratch, NULL, NULL, NULL, 0 };

MILI_FN void mili_conv_grad(mil_node *n, mil_node *dy)
{
    mil_node *x = n->input[0], *w = n->input[1], *bias = n->input_count > 2 ? n->input[2] : NULL;
    mil_spec s = mil_spec_make(n->op, MIL_KIND_ROWS, 3, x->shape);
    s.input_count = 2;
    s.input[0] = dy;
    s.input[1] = w;
    memcpy(s.i, n->i, sizeof s.i);
    s.i[2] = !n->i[2];
    if (mil_wants_grad(x)) mil_add_grad(x, mil_record(n->tape, &s));
    if (!mil_wants_grad(w) && !mil_wants_grad(bias)) return;
    s.op = &mili_op_conv_dw;
    s.kind = MIL_KIND_WHOLE;
    s.rank = 4;
    for (int a = 0; a < 4; a++) s.shape[a] = w->shape[a];
    s.input[0] = x;
    s.input[1] = dy;
    s.i[2] = 0;
    mil_node *dw = mil_record(n->tape, &s);
    mil_add_grad(w, dw);
    if (bias) mil_add_grad(bias, mil_node_second(dw, MIL_REAL_DTYPE, bias->rank, bias->shape));
}
#endif
static const mil_op mili_op_conv = { "conv", mili_conv_run, NULL, NULL, NULL, NULL, NULL, NULL, mili_conv_prepare_bytes, mili_conv_prepare, MILI_GRAD(mili_conv_grad), MIL_OP_WHOLE_INPUTS };

// x as [I, skip + H W, C]; the result has x's own shape.
MILI_FN mil_node *mili_conv_record(mil_node *x, mil_node *weight, mil_node *bias, const int64_t *tokens, int64_t skip, int64_t W, int64_t kh, int64_t kw,
                                   int64_t before_h, int64_t before_w, int by_image)
{
    const int biased = bias != NULL;
    x = mili_real(x);
    weight = mili_real(weight);
    if (!x || !weight) return NULL;
    if (biased && !(bias = mili_real(bias))) return NULL;
    const int64_t G = weight->rank ? weight->shape[0] : 0;
    if (G < 1 || kh < 1 || kw < 1 || weight->count != G * kh * kw || (biased && bias->count != G) || (by_image ? tokens[0] : tokens[2]) % G)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "conv: x %s, weight %s%s%s", MILI_SHAPE(x), MILI_SHAPE(weight), biased ? ", bias " : "", biased ? MILI_SHAPE(bias) : "");
    int64_t filters[4];
    filters[0] = G;
    filters[1] = 1;
    filters[2] = kh;
    filters[3] = kw;
    mil_spec s = mil_spec_make(&mili_op_conv, MIL_KIND_ROWS, 3, tokens);
    s.input_count = biased ? 3 : 2;
    s.input[0] = mil_reshape(x, 3, tokens);
    s.input[1] = mil_reshape(weight, 4, filters);
    s.input[2] = bias;
    s.i[0] = before_h;
    s.i[1] = before_w;
    s.i[3] = by_image;
    s.i[4] = skip;
    s.i[5] = W;
    return mil_reshape(mil_record(x->tape, &s), x->rank, x->shape);
}

MIL_DEF mil_node *mil_conv_tokens(mil_node *x, mil_node *weight, mil_node *bias, int64_t skip, int64_t width)
{
    if (!x || !weight) return NULL;
    if (x->rank != 3 || weight->rank != 4 || skip < 0 || skip > x->shape[1] || width < 1 || (x->shape[1] - skip) % width)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "conv_tokens: x %s, weight %s, a grid of width %lld after %lld tokens", MILI_SHAPE(x), MILI_SHAPE(weight), (long long)width, (long long)skip);
    return mili_conv_record(x, weight, bias, x->shape, skip, width, weight->shape[2], weight->shape[3], weight->shape[2] / 2, weight->shape[3] / 2, 0);
}

MIL_DEF mil_node *mil_conv_grid(mil_node *x, mil_node *weight, mil_node *bias)
{
    if (!x || !weight) return NULL;
    if (x->rank != 4 || weight->rank != 4) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "conv_grid: x %s, weight %s: needs [B, H, W, C] and [G, 1, kh, kw]", MILI_SHAPE(x), MILI_SHAPE(weight));
    int64_t tokens[3];
    tokens[0] = x->shape[0];
    tokens[1] = x->shape[1] * x->shape[2];
    tokens[2] = x->shape[3];
    return mili_conv_record(x, weight, bias, tokens, 0, MILI_MAX(x->shape[2], 1), weight->shape[2], weight->shape[3], weight->shape[2] / 2, weight->shape[3] / 2, 0);
}

MIL_DEF mil_node *mil_conv_rows(mil_node *x, mil_node *weight, mil_node *bias, int64_t before)
{
    if (!x || !weight) return NULL;
    if (x->rank != 3 || weight->rank < 1 || weight->shape[0] < 1) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "conv_rows: x %s, weight %s: needs [B, N, C] and [G, 1, k]", MILI_SHAPE(x), MILI_SHAPE(weight));
    if (before < -INT32_MAX || before > INT32_MAX) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "conv_rows: %lld taps before", (long long)before);
    return mili_conv_record(x, weight, bias, x->shape, 0, 1, weight->count / weight->shape[0], 1, before, 0, 0);
}

MIL_DEF mil_node *mil_conv_maps(mil_node *x, mil_node *weight, mil_node *bias, int64_t before)
{
    if (!x || !weight) return NULL;
    if (x->rank < 3 || weight->rank < 1 || weight->shape[0] < 1 || x->shape[x->rank - 3] != weight->shape[0])
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "conv_maps: x %s, weight %s: needs [.., G, N, M] and [G, 1, k]", MILI_SHAPE(x), MILI_SHAPE(weight));
    int64_t tokens[3];
    tokens[0] = mili_shape_count(x->rank - 2, x->shape);
    tokens[1] = x->shape[x->rank - 2];
    tokens[2] = x->cols;
    return mili_conv_record(x, weight, bias, tokens, 0, 1, weight->count / weight->shape[0], 1, before, 0, 1);
}

// ---- order ----
// Whether a stands before b: larger (or smaller) first, a NaN before all, equal values by index.
MILI_FN int mili_before(mil_real a, int64_t ia, mil_real b, int64_t ib, int largest)
{
    const int na = mili_is_nan(a), nb = mili_is_nan(b);
    if (na || nb) return na && nb ? ia < ib : na;
    return a == b ? ia < ib : largest ? a > b : a < b;
}

// Indices of x [outer, n, inner] along n, sorted; the first k are written. i[]: axis, largest.
MILI_FN void mili_order_task(void *arg, int64_t slice, void *scratch)
{
    const mil_exec *x = (const mil_exec *)arg;
    const mil_node *node = x->node;
    const mili_around s = mili_around_axis(node->input[0], (int)node->i[0]);
    const int64_t k = node->shape[node->i[0]], n = s.n, inner = s.inner, o = slice / inner, j = slice % inner;
    const mil_real *v = MILI_IN(x, 0) + o * n * inner + j;
    int64_t *out = (int64_t *)x->out + o * k * inner + j, *a = (int64_t *)scratch, *b = a + n, count = 0;
    const int largest = (int)node->i[1];
    if (k <= 32) {                                         // one pass with a short sorted list
        for (int64_t i = 0; i < n; i++) {
            if (count == k && (k == 0 || !mili_before(v[i * inner], i, v[a[k - 1] * inner], a[k - 1], largest))) continue;
            int64_t at = count < k ? count++ : k - 1;
            for (; at > 0 && mili_before(v[i * inner], i, v[a[at - 1] * inner], a[at - 1], largest); at--) a[at] = a[at - 1];
            a[at] = i;
        }
    } else {                                               // merge sort
        for (int64_t i = 0; i < n; i++) a[i] = i;
        for (int64_t run = 1; run < n; run *= 2) {
            for (int64_t first = 0; first < n; first += 2 * run) {
                const int64_t middle = MILI_MIN(first + run, n), last = MILI_MIN(first + 2 * run, n);
                int64_t p = first, q = middle;
                for (int64_t at = first; at < last; at++)
                    b[at] = q >= last || (p < middle && mili_before(v[a[p] * inner], a[p], v[a[q] * inner], a[q], largest)) ? a[p++] : a[q++];
            }
            int64_t *t = a;
            a = b;
            b = t;
        }
    }
    for (int64_t i = 0; i < k; i++) out[i * inner] = a[i];
}

MILI_FN void mili_order_run(const mil_exec *x)
{
    const mili_around s = mili_around_axis(x->node->input[0], (int)x->node->i[0]);
    mili_tasks(x, s.outer * s.inner, mili_order_task);
}
MILI_FN size_t mili_order_scratch(const mil_node *n) { return (size_t)n->input[0]->shape[n->i[0]] * 2 * sizeof(int64_t); }
static const mil_op mili_op_topk = { "topk", mili_order_run, NULL, NULL, NULL, NULL, NULL, mili_order_scratch, NULL, NULL, NULL, MIL_OP_STOPS_GRADIENT };
static const mil_op mili_op_argsort = { "argsort", mili_order_run, NULL, NULL, NULL, NULL, NULL, mili_order_scratch, NULL, NULL, NULL, MIL_OP_STOPS_GRADIENT };

MILI_FN mil_node *mili_order(mil_node *x, const mil_op *op, int64_t k, int axis, int largest)
{
    x = mili_real(x);
    if (!x) return NULL;
    const int a = mili_axis(x, axis, op->name);
    if (a < 0) return NULL;
    if (k == -1) k = x->shape[a];
    if (k < 0 || k > x->shape[a]) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "%s: %lld of axis %d of %s", op->name, (long long)k, a, MILI_SHAPE(x));
    mil_spec s = mil_spec_make(op, MIL_KIND_WHOLE, x->rank, x->shape);
    s.dtype = MIL_I64;
    s.shape[a] = k;
    s.input_count = 1;
    s.input[0] = x;
    s.i[0] = a;
    s.i[1] = largest;
    return mil_record(x->tape, &s);
}

MIL_DEF mil_node *mil_topk(mil_node *x, int64_t k, int axis, int largest)
{
    if (x && k < 0) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "topk: k is %lld", (long long)k);
    return mili_order(x, &mili_op_topk, k, axis, largest);
}
MIL_DEF mil_node *mil_argsort(mil_node *x, int axis, int descending) { return mili_order(x, &mili_op_argsort, -1, axis, descending); }

// ---- neighbours ----
// y [B, N, k]: for each row i of q the k rows j of t with the largest <q[i], t[j]>, best first. Tiles of scores and a sorted list
// per row: no [N, M] matrix. A later j needs a truly larger score, so equal ones go to the lowest index.
#define MILI_KNN_QUERIES 256
#define MILI_KNN_KEYS 256
MILI_FN size_t mili_knn_scratch(const mil_node *n)
{
    const size_t lists = (size_t)(MILI_KNN_QUERIES * n->shape[2]);
    return (size_t)(MILI_GEMM_BLOCK + MILI_KNN_QUERIES * MILI_KNN_KEYS) * sizeof(mil_real) + lists * sizeof(mil_real);
}

MILI_FN void mili_knn_task(void *arg, int64_t index, void *scratch)
{
    const mil_exec *x = (const mil_exec *)arg;
    const mil_node *q = x->node->input[0], *t = x->node->input[1];
    const int64_t N = q->shape[1], M = t->shape[1], E = q->shape[2], k = x->node->shape[2], tiles = (N + MILI_KNN_QUERIES - 1) / MILI_KNN_QUERIES;
    const int64_t b = index / tiles, i0 = index % tiles * MILI_KNN_QUERIES, count = MILI_MIN(MILI_KNN_QUERIES, N - i0);
    mil_real *gemm = (mil_real *)scratch, *s = gemm + MILI_GEMM_BLOCK, *best = s + MILI_KNN_QUERIES * MILI_KNN_KEYS;
    int64_t *out = (int64_t *)x->out + (b * N + i0) * k;
    for (int64_t j0 = 0; j0 < M; j0 += MILI_KNN_KEYS) {
        const int64_t keys = MILI_MIN(MILI_KNN_KEYS, M - j0);
        mili_product(MILI_K(x), count, keys, E, MILI_IN(x, 0) + (b * N + i0) * E, E, 1, MILI_IN(x, 1) + (b * M + j0) * E, 1, E, NULL, s, keys, 0, gemm);
        for (int64_t r = 0; r < count; r++) {
            mil_real *top = best + r * k;
            int64_t *at = out + r * k;
            if (j0 >= k && k > 0 && MILI_K(x)->max(s + r * keys, keys) <= top[k - 1]) continue;          // nothing here enters the list
            for (int64_t j = 0; j < keys; j++) {
                const mil_real v = s[r * keys + j];
                int64_t held = MILI_MIN(j0 + j, k);
                if (held == k && (k == 0 || !(v > top[k - 1] || (mili_is_nan(v) && !mili_is_nan(top[k - 1]))))) continue;
                int64_t p = held < k ? held : k - 1;
                for (; p > 0 && mili_before(v, j0 + j, top[p - 1], at[p - 1], 1); p--) {
                    top[p] = top[p - 1];
                    at[p] = at[p - 1];
                }
                top[p] = v;
                at[p] = j0 + j;
            }
        }
    }
}

MILI_FN void mili_knn_run(const mil_exec *x)
{
    const int64_t N = x->node->shape[1];
    mili_tasks(x, x->node->shape[0] * ((N + MILI_KNN_QUERIES - 1) / MILI_KNN_QUERIES), mili_knn_task);
}
static const mil_op mili_op_knn = { "nearest", mili_knn_run, NULL, NULL, NULL, NULL, NULL, mili_knn_scratch, NULL, NULL, NULL, MIL_OP_STOPS_GRADIENT };

MIL_DEF mil_node *mil_nearest(mil_node *q, mil_node *t, int64_t k)
{
    q = mili_real(q);
    t = mili_real(t);
    if (!q || !t) return NULL;
    if (q->rank != 3 || t->rank != 3 || q->shape[0] != t->shape[0] || q->shape[2] != t->shape[2] || k < 0 || k > t->shape[1])
        return mil_tape_fail(q->tape, MIL_ERROR_SHAPE, "nearest: the %lld best of %s for %s", (long long)k, MILI_SHAPE(t), MILI_SHAPE(q));
    mil_spec s = mil_spec_make(&mili_op_knn, MIL_KIND_WHOLE, 3, q->shape);
    s.dtype = MIL_I64;
    s.shape[2] = k;
    s.input_count = 2;
    s.input[0] = q;
    s.input[1] = t;
    return mil_record(q->tape, &s);
}

// y [B, M, k E]: row (b, i) holds the rows index[b,i,0], index[b,i,1], ... of x[b] side by side. Row-wise in the index, so with a
// short k and slices of the last axis nothing of size [B, M, k, E] need exist. An index outside x gives NaNs (and an error
// from the gradient).
MILI_FN void mili_gather_rows_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const int64_t M = n->shape[1], N = n->input[0]->shape[1], E = n->input[0]->shape[2], k = n->input[1]->shape[2];
    for (int64_t r = 0; r < x->rows; r++) {
        const int64_t b = (x->row + r) / M;
        for (int64_t j = 0; j < k; j++) {
            const int64_t at = MILI_IN_INDEX(x, 1)[r * k + j];
            mil_real *y = MILI_OUT(x) + (r * k + j) * E;
            if (at >= 0 && at < N) memcpy(y, MILI_IN(x, 0) + (b * N + at) * E, (size_t)E * sizeof *y);
            else for (int64_t c = 0; c < E; c++) y[c] = MILI_NAN;
        }
    }
}

#ifndef MIL_NO_TRAINING
// The reverse: x [B, N, E] with x[b,n] = the sum of all pieces of dy whose index is n, in their order. A counting sort of the
// indices gives each row its list, so that rows can be summed in parallel.
MILI_FN size_t mili_scatter_rows_scratch(const mil_node *n) { return (size_t)(n->shape[0] * n->shape[1] + 1 + n->input[1]->count) * sizeof(int64_t); }

MILI_FN void mili_scatter_rows_body(const mil_exec *x, int64_t begin, int64_t end)
{
    const int64_t E = x->node->shape[2], *start = (const int64_t *)x->scratch, *list = start + x->node->shape[0] * x->node->shape[1] + 1;
    for (int64_t row = begin; row < end; row++) {
        mil_real *y = MILI_OUT(x) + row * E;
        memset(y, 0, (size_t)E * sizeof *y);
        for (int64_t i = start[row]; i < start[row + 1]; i++) MILI_K(x)->add(y, y, MILI_IN(x, 0) + list[i] * E, E);
    }
}

MILI_FN void mili_scatter_rows_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const int64_t B = n->shape[0], N = n->shape[1], rows = B * N, pieces = n->input[1]->count, each = B ? pieces / B : 0, *index = MILI_IN_INDEX(x, 1);
    int64_t *start = (int64_t *)x->scratch, *list = start + rows + 1;
    memset(x->out, 0, (size_t)n->count * sizeof(mil_real));
    if (!mili_check_index(x, index, pieces, N) || rows == 0) return;
    memset(start, 0, (size_t)(rows + 1) * sizeof *start);
    for (int64_t i = 0; i < pieces; i++) start[i / each * N + index[i] + 1]++;
    for (int64_t r = 0; r < rows; r++) start[r + 1] += start[r];
    for (int64_t i = 0; i < pieces; i++) list[start[i / each * N + index[i]]++] = i;
    for (int64_t r = rows; r > 0; r--) start[r] = start[r - 1];              // filling moved each start to the next one's
    start[0] = 0;
    mili_for(x, rows, n->shape[2] * (1 + pieces / rows), mili_scatter_rows_body);
}

MILI_FN void mili_scatter_rows_grad(mil_node *n, mil_node *dy);
static const mil_op mili_op_scatter_rows = { "scatter_rows", mili_scatter_rows_run, NULL, NULL, NULL, NULL, NULL, mili_scatter_rows_scratch, NULL, NULL, mili_scatter_rows_grad, 0 };

MILI_FN void mili_gather_rows_grad(mil_node *n, mil_node *dy)
{
    mil_spec s = mil_spec_make(&mili_op_scatter_rows, MIL_KIND_WHOLE, 3, n->input[0]->shape);
    s.input_count = 2;
    s.input[0] = dy;
    s.input[1] = n->input[1];
    mil_add_grad(n->input[0], mil_record(n->tape, &s));
}
MILI_FN void mili_scatter_rows_grad(mil_node *n, mil_node *dy) { mil_add_grad(n->input[0], mil_gather_rows(dy, n->input[1])); }
#endif
static const mil_op mili_op_gather_rows = MILI_ROWS_OP("gather_rows", mili_gather_rows_run, mili_gather_rows_grad);

MIL_DEF mil_node *mil_gather_rows(mil_node *x, mil_node *index)
{
    x = mili_real(x);
    index = mili_index(index);
    if (!x || !index) return NULL;
    if (x->rank != 3 || index->rank != 3 || x->shape[0] != index->shape[0] || (x->shape[2] > 0 && index->shape[2] > INT64_MAX / 8 / x->shape[2]))
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "gather_rows: x %s by index %s: needs [B, N, E] and [B, M, k]", MILI_SHAPE(x), MILI_SHAPE(index));
    mil_spec s = mil_spec_make(&mili_op_gather_rows, MIL_KIND_ROWS, 3, index->shape);
    s.shape[2] = index->shape[2] * x->shape[2];
    s.input_count = 2;
    s.input[0] = x;
    s.input[1] = index;
    s.row_inputs = 2;
    return mil_record(x->tape, &s);
}

// ---- smooth top-1 SVM loss (Berrada, Zisserman, Kumar, ICLR 2018), per row; target y, delta_j = alpha [j != y] ----
//   hard row, largest - second largest score >= tau ln 1000:  l = max_j (x_j + delta_j) - x_y
//   smooth row, otherwise:                                    l = tau log sum_j exp((x_j + delta_j - x_y) / tau)
// The test has no gradient. Inputs: x [R, C], labels [R, 1]. With a third, dl [R, 1], the result is dx [R, C].
MILI_FN void mili_svm_run(const mil_exec *x)
{
    const mil_node *n = x->node;
    const int64_t C = n->input[0]->cols;
    const mil_real alpha = (mil_real)n->r[0], tau = (mil_real)n->r[1];
    const int grad = n->input_count > 2;
    for (int64_t r = 0; r < x->rows; r++) {
        const mil_real *s = MILI_IN(x, 0) + r * C;
        const int64_t y = MILI_IN_INDEX(x, 1)[r];
        mil_real first = -MILI_INF, second = -MILI_INF, top = -MILI_INF, sum = 0, *out = MILI_OUT(x) + r * n->cols;
        int64_t at = 0;
        if (y < 0 || y >= C || mili_is_nan(s[mili_row_argmax(s, C, 0)])) {
            for (int64_t j = 0; j < n->cols; j++) out[j] = MILI_NAN;
            continue;
        }
        for (int64_t j = 0; j < C; j++) {
            const mil_real v = s[j] + (j != y ? alpha : 0);
            if (s[j] > first) { second = first; first = s[j]; }
            else if (s[j] > second) second = s[j];
            if (v > top) { top = v; at = j; }
        }
        const int hard = first - second >= tau * (mil_real)6.907755278982137;
        for (int64_t j = 0; j < C; j++) sum += mili_exp((s[j] + (j != y ? alpha : 0) - top) / tau);
        if (!grad) *out = hard ? top - s[y] : tau * mili_log(sum) + (top - s[y]);
        else
            for (int64_t j = 0; j < C; j++) {
                const mil_real p = hard ? (mil_real)(j == at) : mili_exp((s[j] + (j != y ? alpha : 0) - top) / tau) / sum;
                out[j] = MILI_IN(x, 2)[r] * (p - (mil_real)(j == y));
            }
    }
}

#ifndef MIL_NO_TRAINING
static const mil_op mili_op_svm_grad = MILI_ROWS_OP("gradient of smooth_svm", mili_svm_run, NULL);

MILI_FN void mili_svm_grad(mil_node *n, mil_node *dy)
{
    mil_spec s = mil_spec_make(&mili_op_svm_grad, MIL_KIND_ROWS, 2, n->input[0]->shape);
    s.input_count = 3;
    s.input[0] = n->input[0];
    s.input[1] = n->input[1];
    s.input[2] = dy;
    s.row_inputs = 7;
    s.r[0] = n->r[0];
    s.r[1] = n->r[1];
    mil_add_grad(n->input[0], mil_record(n->tape, &s));
}
#endif
static const mil_op mili_op_svm = MILI_ROWS_OP("smooth_svm", mili_svm_run, mili_svm_grad);

MIL_DEF mil_node *mil_smooth_svm(mil_node *scores, mil_node *labels, double alpha, double tau)
{
    scores = mili_real(scores);
    labels = mili_index(labels);
    if (!scores || !labels) return NULL;
    if (scores->rank != 2 || labels->count != scores->shape[0] || scores->cols < 1 || scores->shape[0] < 1)
        return mil_tape_fail(scores->tape, MIL_ERROR_SHAPE, "smooth_svm: scores %s, labels %s", MILI_SHAPE(scores), MILI_SHAPE(labels));
    if (!(tau > 0)) return mil_tape_fail(scores->tape, MIL_ERROR_ARGUMENT, "smooth_svm: tau is %g", tau);
    mil_spec s = mil_spec_make(&mili_op_svm, MIL_KIND_ROWS, 2, scores->shape);
    s.shape[1] = 1;
    s.input_count = 2;
    s.input[0] = scores;
    s.input[1] = mil_reshape(labels, 2, s.shape);
    s.row_inputs = 3;
    s.r[0] = alpha;
    s.r[1] = tau;
    return mil_reshape(mil_mean(mil_record(scores->tape, &s), 0), 0, NULL);
}

// ---- drop path ----
// One draw per slice of the first axis, shared by all that follows.
MIL_DEF mil_node *mil_drop_path(mil_node *x, double rate, const char *draw)
{
    x = mili_real(x);
    if (!x || !MILI_IS_TRAINING(x->tape) || rate == 0) return x;
    if (x->rank < 1) return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "drop_path: of a scalar");
    int64_t shape[MIL_MAX_RANK];
    for (int a = 0; a < x->rank; a++) shape[a] = a ? 1 : x->shape[0];
    return mili_dropout(x, shape, rate, draw);
}

// ---- the list of ops ----
// What users record by name, and its gradients; not what is the tape's own (inputs, parameters, second results) or the
// optimizers'. An op that is not one of the lists above (unary, binary, reductions) has its row here.
#define MILI_OPS(X) X(convert) X(constant) X(reshape) X(detach) X(permute) X(concat) X(slice) X(pad) X(softmax) X(linear) X(matmul_tn) \
    X(matmul) X(softmax_pool) X(layer_norm) X(gather) X(scatter_add) X(one_hot) X(random) X(permutation) X(attention) X(attention_keys) \
    X(attention_weights) X(run_mean) X(identity_minus) X(conv) X(topk) X(argsort) X(knn) X(gather_rows) X(svm)
#ifndef MIL_NO_TRAINING
#define MILI_GRAD_OPS(X) X(unary_grad) X(select_grad) X(place) X(softmax_grad) X(layer_norm_grad) X(attention_dq) X(attention_dkv) \
    X(run_mean_grad) X(conv_dw) X(scatter_rows) X(svm_grad)
#else
#define MILI_GRAD_OPS(X)
#endif

#define MILI_OP_POINTER(name) &mili_op_##name,
static const mil_op *const mili_single_ops[] = { MILI_OPS(MILI_OP_POINTER) MILI_GRAD_OPS(MILI_OP_POINTER) };
#undef MILI_OP_POINTER

MIL_DEF int64_t mil_op_count(void)
{
    return MILI_COUNT(mili_single_ops) + MILI_COUNT(mili_unary_ops) + MILI_COUNT(mili_binary_ops) + MILI_COUNT(mili_reduction_ops);
}

MIL_DEF const mil_op *mil_op_at(int64_t i)
{
    if (i < 0 || i >= mil_op_count()) return NULL;
    if (i < MILI_COUNT(mili_single_ops)) return mili_single_ops[i];
    i -= MILI_COUNT(mili_single_ops);
    if (i < MILI_COUNT(mili_unary_ops)) return &mili_unary_ops[i];
    i -= MILI_COUNT(mili_unary_ops);
    return i < MILI_COUNT(mili_binary_ops) ? &mili_binary_ops[i] : &mili_reduction_ops[i - MILI_COUNT(mili_binary_ops)];
}

MIL_DEF const mil_op *mil_op_find(const char *name)
{
    for (int64_t i = 0; name && i < mil_op_count(); i++)
        if (strcmp(mil_op_at(i)->name, name) == 0) return mil_op_at(i);
    return NULL;
}

// ==== >>layer-code: layers ========================================================================================

// What a model is declared with: the model under construction and the scopes pushed so far.
struct mil_builder {
    mil_model *model;
    char       scope[128];
    size_t     start[MILI_MAX_SCOPES];                     // where each pushed scope begins in it
    int        depth;
    mil_status status;
    int64_t    limit, declared;                            // elements: the most that parameters may have (0: any), and have so far
};

// ---- activations by name ----
MIL_DEF mil_node *mil_activate(mil_node *x, mil_activation activation)
{
    switch (activation) {
    case MIL_ACT_NONE:       return x;
    case MIL_ACT_RELU:       return mil_relu(x);
    case MIL_ACT_LEAKY_RELU: return mil_leaky_relu(x, 0.01);
    case MIL_ACT_GELU:       return mil_gelu(x);
    case MIL_ACT_SILU:       return mil_silu(x);
    case MIL_ACT_TANH:       return mil_tanh(x);
    case MIL_ACT_SIGMOID:    return mil_sigmoid(x);
    case MIL_ACT_COUNT:      break;
    }
    return x;
}

// The caller's key as text; one that would be cut is refused, as it would be another key.
#define MILI_KEY(name, key)                                                                                                \
    char name[128];                                                                                                        \
    {                                                                                                                      \
        va_list key_args;                                                                                                  \
        va_start(key_args, key);                                                                                           \
        const int key_length = vsnprintf(name, sizeof name, key, key_args);                                                \
        va_end(key_args);                                                                                                  \
        if (key_length < 0 || key_length >= (int)sizeof name)                                                              \
            mil_declare_fail(b, MIL_ERROR_ARGUMENT, "parameter key %s... is too long", name);                              \
    }

// ---- linear ----
MIL_DEF mil_linear_layer mil_declare_linear(mil_builder *b, int64_t in, int64_t out, int bias, mil_linear_init init, const char *key, ...)
{
    mil_linear_layer layer;
    MILI_KEY(name, key)
    int64_t shape[2];
    shape[0] = out;
    shape[1] = in;
    mil_init w, z;
    z.kind = w.kind = MIL_INIT_UNIFORM;
    switch (init) {
    case MIL_LINEAR_KAIMING: w.a = sqrt(6.0 / (double)MILI_MAX(in, 1)); z.kind = MIL_INIT_CONSTANT; z.a = 0; break;
    case MIL_LINEAR_XAVIER:  w.a = sqrt(6.0 / (double)MILI_MAX(in + out, 1)); z.kind = MIL_INIT_CONSTANT; z.a = 0; break;
    default:                 w.a = z.a = 1 / sqrt((double)MILI_MAX(in, 1)); break;
    }
    layer.weight = mil_declare(b, w, 2, shape, "%s.weight", name);
    layer.bias = bias ? mil_declare(b, z, 1, &out, "%s.bias", name) : NULL;
    return layer;
}

MIL_DEF mil_node *mil_linear_forward(const mil_linear_layer *layer, mil_node *x)
{
    if (!x) return NULL;
    return mil_linear(x, mil_use(x->tape, layer->weight), layer->bias ? mil_use(x->tape, layer->bias) : NULL);
}

// ---- layer norm ----
MIL_DEF mil_norm_layer mil_declare_layer_norm(mil_builder *b, int64_t width, double eps, const char *key, ...)
{
    mil_norm_layer layer;
    MILI_KEY(name, key)
    const mil_init one = { MIL_INIT_CONSTANT, 1 }, zero = { MIL_INIT_CONSTANT, 0 };
    layer.weight = mil_declare(b, one, 1, &width, "%s.weight", name);
    layer.bias = mil_declare(b, zero, 1, &width, "%s.bias", name);
    layer.eps = eps;
    return layer;
}

MIL_DEF mil_node *mil_layer_norm_forward(const mil_norm_layer *layer, mil_node *x)
{
    if (!x) return NULL;
    return mil_layer_norm(x, mil_use(x->tape, layer->weight), mil_use(x->tape, layer->bias), layer->eps);
}

// ---- MIL-Lab's patch MLP ----
MIL_DEF mil_patch_mlp mil_declare_patch_mlp(mil_builder *b, int64_t in, int64_t width, int64_t layers, double dropout, const char *key)
{
    mil_patch_mlp layer;
    memset(&layer, 0, sizeof layer);
    layer.layers = MILI_MIN(layers, MIL_MLP_MAX_LAYERS);
    layer.dropout = dropout;
    if (layers < 1 || layers > MIL_MLP_MAX_LAYERS)
        mil_declare_fail(b, MIL_ERROR_ARGUMENT, "%s: %lld layers, 1 to %d are offered", key, (long long)layers, MIL_MLP_MAX_LAYERS);
    for (int64_t i = 0; i < layer.layers; i++)             // linear, relu, dropout: three modules a layer
        layer.linear[i] = mil_declare_linear(b, i ? width : in, width, 1, MIL_LINEAR_KAIMING, "%s.%lld", key, (long long)(3 * i));
    return layer;
}

MIL_DEF mil_node *mil_patch_mlp_forward(const mil_patch_mlp *layer, mil_node *x)
{
    for (int64_t i = 0; i < layer->layers; i++) {
        x = mil_relu(mil_linear_forward(&layer->linear[i], x));
        if (i + 1 < layer->layers) x = mil_dropout(x, layer->dropout, "patch_embed");
    }
    return x;
}

// ---- the attention scorer ----
MIL_DEF mil_attention_scorer mil_declare_attention_scorer(mil_builder *b, int64_t in, int64_t width, int64_t heads, int gated, double dropout, const char *key)
{
    mil_attention_scorer layer;
    memset(&layer, 0, sizeof layer);
    layer.gated = gated;
    layer.dropout = dropout;
    layer.activation = MIL_ACT_TANH;
    layer.V = mil_declare_linear(b, in, width, 1, MIL_LINEAR_KAIMING, gated ? "%s.attention_a.0" : "%s.module.0", key);
    if (gated) layer.U = mil_declare_linear(b, in, width, 1, MIL_LINEAR_KAIMING, "%s.attention_b.0", key);
    layer.w = mil_declare_linear(b, width, heads, 1, MIL_LINEAR_KAIMING, gated ? "%s.attention_c" : "%s.module.3", key);
    return layer;
}

MIL_DEF mil_node *mil_attention_scores(const mil_attention_scorer *layer, mil_node *h)
{
    mil_node *v = mil_activate(mil_linear_forward(&layer->V, h), layer->activation);           // [.., A]  what is seen
    v = mil_dropout(v, layer->dropout, "attention_a");
    if (layer->gated) {
        mil_node *u = mil_sigmoid(mil_linear_forward(&layer->U, h));                           // [.., A]  how much of it counts
        v = mil_mul(v, mil_dropout(u, layer->dropout, "attention_b"));
    }
    return mil_linear_forward(&layer->w, v);                                                   // [.., K]
}

// ---- torchmil's attention pool: other keys, no bias behind the last layer ----
MIL_DEF mil_attention_scorer mil_declare_attention_pool(mil_builder *b, int64_t in, int64_t width, mil_activation activation, int gated, const char *key)
{
    mil_attention_scorer layer;
    memset(&layer, 0, sizeof layer);
    layer.gated = gated;
    layer.activation = activation;
    layer.V = mil_declare_linear(b, in, width, 1, MIL_LINEAR_TORCH, "%s.fc1.module", key);
    layer.w = mil_declare_linear(b, width, 1, 0, MIL_LINEAR_TORCH, "%s.fc2", key);
    if (gated) layer.U = mil_declare_linear(b, in, width, 1, MIL_LINEAR_TORCH, "%s.fc_gated.module", key);
    return layer;
}

// ---- an MLP given by lists ----
MIL_DEF int64_t mil_declare_mlp(mil_builder *b, int64_t in, const mil_int_list *sizes, const mil_text_list *activations, mil_mlp *out, const char *key)
{
    int module = 0;
    memset(out, 0, sizeof *out);
    if (sizes->count != activations->count)
        mil_declare_fail(b, MIL_ERROR_ARGUMENT, "%s: %d sizes and %d activations", key, sizes->count, activations->count);
    out->layers = MILI_MIN(sizes->count, activations->count);
    for (int i = 0; i < out->layers; i++) {
        const char *name = activations->value[i];
        out->linear[i] = mil_declare_linear(b, in, sizes->value[i], 1, MIL_LINEAR_TORCH, "%s.%d", key, module);
        out->activation[i] = strstr(name, "relu") ? MIL_ACT_RELU : strstr(name, "sigmoid") ? MIL_ACT_SIGMOID : strstr(name, "tanh") ? MIL_ACT_TANH : MIL_ACT_NONE;
        module += out->activation[i] == MIL_ACT_NONE ? 1 : 2;
        in = sizes->value[i];
    }
    return in;
}

MIL_DEF mil_node *mil_mlp_forward(const mil_mlp *layer, mil_node *x)
{
    for (int i = 0; i < layer->layers; i++) x = mil_activate(mil_linear_forward(&layer->linear[i], x), layer->activation[i]);
    return x;
}
// ---- multi-head attention ----

// Part `part` of a stack of equal linear layers: x W_part^T + b_part, W and b being consecutive rows of the stack.
MILI_FN mil_node *mili_stacked_linear(mil_node *x, mil_param *weight, mil_param *bias, int64_t part, int64_t parts)
{
    if (!x || !weight) return NULL;
    const int64_t width = weight->shape[0] / parts;
    mil_node *w = mil_slice(mil_use(x->tape, weight), 0, part * width, width);
    return mil_linear(x, w, bias ? mil_slice(mil_use(x->tape, bias), 0, part * width, width) : NULL);
}

MIL_DEF mil_mha_layer mil_declare_mha(mil_builder *b, int64_t width, int64_t heads, double dropout, mil_linear_init out_init, const char *key, ...)
{
    mil_mha_layer layer;
    mil_init init;
    int64_t shape[2];
    MILI_KEY(name, key)
    shape[0] = 3 * width;
    shape[1] = width;
    init.kind = MIL_INIT_UNIFORM;
    init.a = sqrt(6.0 / (double)MILI_MAX(4 * width, 1));   // torch's Xavier start of the whole stack
    layer.weight = mil_declare(b, init, 2, shape, "%s.in_proj_weight", name);
    init.kind = MIL_INIT_CONSTANT;
    init.a = 0;
    layer.bias = mil_declare(b, init, 1, shape, "%s.in_proj_bias", name);
    layer.out = mil_declare_linear(b, width, width, 1, out_init, "%s.out_proj", name);
    layer.heads = heads;
    layer.dropout = dropout;
    if (heads < 1 || width % heads) mil_declare_fail(b, MIL_ERROR_ARGUMENT, "%s: width %lld is not a multiple of %lld heads", name, (long long)width, (long long)heads);
    return layer;
}

// Keys (part 1) or values (part 2) of x, made once `before` (NULL: nothing) is complete. Where x is a linear layer of u itself,
// (u W_1^T + b_1) W^T + b = u (W W_1)^T + (W b_1 + b): with more rows than u has columns, the product of the weights is cheaper.
MILI_FN mil_node *mili_mha_keys(const mil_mha_layer *layer, mil_node *x, int64_t part, mil_node *before)
{
    if (!x || !layer->weight) return NULL;
    const int64_t width = layer->weight->shape[1];
    mil_node *w = mil_slice(mil_use(x->tape, layer->weight), 0, part * width, width);
    mil_node *b = mil_slice(mil_use(x->tape, layer->bias), 0, part * width, width);
    if (x->op == &mili_op_linear && x->i[0] && x->rows > x->input[0]->cols) {
        if (x->input_count > 2) b = mil_linear(x->input[2], w, b);
        w = mil_matmul(w, x->input[1]);
        x = x->input[0];
    }
    return mil_linear(before ? mili_after(x, before) : x, w, b);
}

MIL_DEF mil_node *mil_mha_forward(const mil_mha_layer *layer, mil_node *q, mil_node *k, mil_node *v, mil_node *key_mask, mil_node **attention)
{
    const int few = q && k && q->shape[1] < k->shape[1];                                       // queries first, keys and values stream
    mil_node *Q = few ? mili_stacked_linear(q, layer->weight, layer->bias, 0, 3) : NULL;       // [B, n, E]
    mil_node *K = mili_mha_keys(layer, k, 1, Q), *V = mili_mha_keys(layer, v, 2, Q);           // [B, m, E]
    if (!few) Q = mili_stacked_linear(q, layer->weight, layer->bias, 0, 3);
    mil_node *o = mil_attention(Q, K, V, layer->heads, 0, key_mask, layer->dropout, "attention");
    if (attention) *attention = o;
    return mil_linear_forward(&layer->out, o);
}

// ---- Nystrom attention ----
// [B, n, H d] -> [B, H, n, d], and back.
MILI_FN mil_node *mili_split_heads(mil_node *x, int64_t heads)
{
    static const int axes[4] = { 0, 2, 1, 3 };
    int64_t shape[4];
    if (!x) return NULL;
    shape[0] = x->shape[0];
    shape[1] = x->shape[1];
    shape[2] = heads;
    shape[3] = x->shape[2] / heads;
    return mil_permute(mil_reshape(x, 4, shape), axes);
}

MILI_FN mil_node *mili_join_heads(mil_node *x)
{
    static const int axes[4] = { 0, 2, 1, 3 };
    int64_t shape[3];
    if (!x) return NULL;
    shape[0] = x->shape[0];
    shape[1] = x->shape[2];
    shape[2] = x->shape[1] * x->shape[3];
    return mil_reshape(mil_permute(x, axes), 3, shape);
}

MIL_DEF mil_node *mil_pseudo_inverse(mil_node *a, int64_t iterations, int per_matrix)
{
    if (!a) return NULL;
    const int r = a->rank;
    if (r < 2 || r > 4 || a->shape[r - 2] != a->shape[r - 1] || a->count < 1)
        return mil_tape_fail(a->tape, MIL_ERROR_SHAPE, "pseudo_inverse: %s: needs [m, m], [H, m, m] or [B, H, m, m]", MILI_SHAPE(a));
    mil_node *size = mil_abs(a), *sums[2], *norm = NULL;
    int64_t flat[2], one[4] = { 1, 1, 1, 1 };
    for (int i = 0; i < r - 2; i++) one[i] = per_matrix ? a->shape[i] : 1;
    flat[0] = per_matrix ? a->count / (a->cols * a->cols) : 1;
    flat[1] = -1;
    sums[0] = mil_sum(size, -1);
    sums[1] = mil_sum(size, -2);
    for (int i = 0; i < 2; i++) {
        mil_node *top = mil_reshape(mil_max(mil_reshape(sums[i], 2, flat), 1), r, one);        // c, then r
        norm = norm ? mil_mul(norm, top) : top;
    }
    mil_node *z = mil_div(mil_transpose(a), norm);
    for (int64_t i = 0; i < iterations; i++) {
        mil_node *y = mil_matmul(a, z);
        mil_node *t = mil_matmul(y, mil_identity_minus(y, 7));
        t = mil_matmul(y, mil_identity_minus(t, 15));
        z = mil_affine(mil_matmul(z, mil_identity_minus(t, 13)), 0.25, 0);
    }
    return z;
}

MIL_DEF mil_nystrom_options mil_nystrom_options_default(int64_t in_dim, int64_t heads, int64_t head_dim, int64_t landmarks)
{
    mil_nystrom_options o;
    memset(&o, 0, sizeof o);
    o.in_dim = o.out_dim = in_dim;
    o.heads = heads;
    o.head_dim = head_dim;
    o.landmarks = landmarks;
    o.taps = 33;
    o.iterations = 6;
    o.out_bias = 1;
    o.init = MIL_LINEAR_KAIMING;
    o.qkv = "to_qkv";
    o.out = "to_out.0";
    o.conv = "res_conv";
    return o;
}

MIL_DEF mil_nystrom_layer mil_declare_nystrom(mil_builder *b, const mil_nystrom_options *options, const char *key, ...)
{
    mil_nystrom_layer layer;
    const mil_nystrom_options *o = options;
    const int64_t width = o->heads * o->head_dim;
    MILI_KEY(name, key)
    memset(&layer, 0, sizeof layer);
    layer.o = *o;
    if (o->heads < 1 || o->head_dim < 1 || o->landmarks < 1)
        mil_declare_fail(b, MIL_ERROR_ARGUMENT, "%s: %lld heads of width %lld, %lld landmarks", name, (long long)o->heads, (long long)o->head_dim, (long long)o->landmarks);
    const mil_linear_layer qkv = mil_declare_linear(b, o->in_dim, 3 * width, o->qkv_bias, o->init, "%s.%s", name, o->qkv);
    layer.qkv = qkv.weight;
    layer.qkv_bias = qkv.bias;
    if (o->out_dim > 0) layer.out = mil_declare_linear(b, width, o->out_dim, o->out_bias, o->init, "%s.%s", name, o->out);
    if (o->taps > 0) {
        mil_init init;
        int64_t shape[4];
        shape[0] = o->heads;
        shape[1] = shape[3] = 1;
        shape[2] = o->taps;
        init.kind = MIL_INIT_UNIFORM;
        init.a = o->init == MIL_LINEAR_TORCH ? 1 / sqrt((double)o->taps) : sqrt(6.0 / (double)(o->taps * (1 + o->heads)));
        layer.conv = mil_declare(b, init, 4, shape, "%s.%s.weight", name, o->conv);
    }
    return layer;
}

// y where e is 1, other where it is 0: y e + other (1 - e), e [B, m].
MILI_FN mil_node *mili_where_row(mil_node *y, mil_node *e, mil_node *other)
{
    int64_t shape[3];
    if (!e) return NULL;
    shape[0] = e->shape[0];
    shape[1] = e->shape[1];
    shape[2] = 1;
    e = mil_reshape(e, 3, shape);
    return mil_add(mil_mul(y, e), mil_mul(other, mil_affine(e, -1, 1)));
}

MIL_DEF mil_node *mil_nystrom_forward(const mil_nystrom_layer *layer, mil_node *x, mil_node *mask, int64_t rows, mil_nystrom_parts *parts)
{
    const mil_nystrom_options *o = &layer->o;
    if (parts) memset(parts, 0, sizeof *parts);
    if (!x || !layer->qkv) return NULL;
    if (x->rank != 3 || x->shape[2] != o->in_dim || x->shape[1] < 1)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "nystrom attention: x %s, needs [B, n, %lld]", MILI_SHAPE(x), (long long)o->in_dim);
    mil_tape *tape = x->tape;
    const int64_t n = x->shape[1], H = o->heads, m = o->landmarks, padding = (m - n % m) % m, l = (n + padding) / m;
    const double scale = 1 / sqrt((double)o->head_dim);
    const int padless = !layer->qkv_bias && !mask;         // a zero row then gives zeros, and need not exist
    int64_t first = 0;                                     // the first real row of x as it is used below
    if (rows < 0 || rows > n) rows = n;

    // Without a bias q, k and v of a zero row are zero: such rows need not exist. They are zeros in the means, and keys of
    // score 0 and value 0. And the mean of rows of q is q of the mean row.
    mil_node *q, *k, *v, *q_marks, *k_marks, *exist = NULL;
    int64_t null_keys = padding;
    mil_node *whole = x;
    if (padless) {
        mil_node *means = mil_run_mean(x, m, padding);                                         // [B, m, in]
        q_marks = mili_stacked_linear(means, layer->qkv, NULL, 0, 3);                          // [B, m, H d]
        k_marks = mili_stacked_linear(means, layer->qkv, NULL, 1, 3);
        q = whole;
        x = mili_after(x, q_marks);                        // keys and values are made once the landmarks are known
        k = mili_stacked_linear(x, layer->qkv, NULL, 1, 3);                                    // [B, n, H d]
        v = mili_stacked_linear(x, layer->qkv, NULL, 2, 3);
    } else {
        x = mil_pad(x, 1, padding, 0);
        q = mili_stacked_linear(x, layer->qkv, layer->qkv_bias, 0, 3);                         // [B, n', H d]
        k = mili_stacked_linear(x, layer->qkv, layer->qkv_bias, 1, 3);
        v = mili_stacked_linear(x, layer->qkv, layer->qkv_bias, 2, 3);
        null_keys = 0;
        first = padding;
        if (mask) {
            int64_t shape[3];
            shape[0] = mask->shape[0];
            shape[1] = n + padding;
            shape[2] = 1;
            mask = mil_pad(mask, 1, padding, 0);                                               // [B, n']
            mil_node *real = mil_reshape(mask, 3, shape);
            q = mil_mul(q, real);
            k = mil_mul(k, real);
            v = mil_mul(v, real);
            mil_node *count = mil_affine(mil_run_mean(real, m, 0), (double)l, 0);              // [B, m, 1] existing rows of each run
            mil_node *share = mil_div(mil_constant(tape, 0, NULL, (double)l), mil_affine(count, 1, 1e-8));
            q_marks = mil_mul(mil_run_mean(q, m, 0), share);
            k_marks = mil_mul(mil_run_mean(k, m, 0), share);
            shape[1] = m;
            exist = mil_reshape(mil_clamp(count, 0, 1), 2, shape);                             // [B, m]
        } else {
            q_marks = mil_run_mean(q, m, 0);
            k_marks = mil_run_mean(k, m, 0);
        }
    }

    mil_node *kh = mili_split_heads(k_marks, H);                                               // [B, H, m, d]
    mil_node *s = mil_affine(mil_matmul_t(mili_split_heads(q_marks, H), kh, 0, 1), scale, 0);
    if (exist) {                                           // a missing landmark attends to all equally
        int64_t column[4], line[4];
        column[0] = line[0] = exist->shape[0];
        column[1] = line[1] = column[3] = line[2] = 1;
        column[2] = line[3] = m;
        s = mil_mask_fill(s, mil_mul(mil_reshape(exist, 4, column), mil_reshape(exist, 4, line)), -(double)MILI_REAL_MAX);
    }
    mil_node *Z = mil_pseudo_inverse(mil_softmax(s, -1), o->iterations, o->per_matrix);        // [B, H, m, m]
    mil_node *pool = mili_attention_record(q_marks, k, v, H, scale, mask, null_keys, 0, NULL); // [B, m, H d]  softmax(q~ k^T) v
    mil_node *values = exist ? mili_where_row(pool, exist, mil_mean(v, 1)) : pool;
    values = mili_join_heads(mil_matmul(Z, mili_split_heads(values, H)));                      // the small product first
    if (padless)                                           // and queries at last
        q = mili_stacked_linear(rows == n ? mili_after(q, values) : mili_first_rows(q, rows), layer->qkv, NULL, 0, 3);       // [B, rows, H d]
    mil_node *y = mili_attention_record(q, k_marks, values, H, scale, exist, 0, 0, NULL);      // [B, rows, H d]
    if (mask) y = mili_where_row(y, mask, mil_mean(values, 1));
    if (layer->conv) {
        mil_node *nearest = v;                                // the rows that the wanted ones can see
        if (padless && rows + o->taps < n) nearest = mili_stacked_linear(mili_first_rows(whole, rows + o->taps), layer->qkv, NULL, 2, 3);
        mil_node *c = mil_conv_rows(nearest, mil_use(tape, layer->conv), NULL, o->taps / 2);
        if (padless) c = mil_slice(c, 1, 0, rows);
        y = mil_add(y, c);
    }
    if (first > 0 || (y && y->shape[1] != rows)) y = mil_slice(y, 1, first, rows);
    if (parts) {
        parts->q = q;
        parts->k = k;
        parts->q_marks = q_marks;
        parts->k_marks = k_marks;
        parts->inverse = Z;
        parts->pool = pool;
        parts->padding = first;
    }
    if (layer->out.weight) y = mil_linear_forward(&layer->out, y);
    return mil_dropout(y, o->dropout, "attention");
}

MIL_DEF mil_node *mil_nystrom_weights(const mil_nystrom_layer *layer, const mil_nystrom_parts *parts, int64_t row)
{
    if (!parts->q || !parts->k || !parts->pool) return NULL;
    if (row < 0) return mil_tape_fail(parts->q->tape, MIL_ERROR_SHAPE, "nystrom attention: weights of row %lld", (long long)row);
    const int64_t H = layer->o.heads;
    const double scale = 1 / sqrt((double)layer->o.head_dim);
    int64_t shape[4];
    mil_node *q = mili_split_heads(mil_slice(parts->q, 1, row + parts->padding, 1), H);        // [B, H, 1, d]
    mil_node *a1 = mil_softmax(mil_affine(mil_matmul_t(q, mili_split_heads(parts->k_marks, H), 0, 1), scale, 0), -1);         // [B, H, 1, m]
    mil_node *scores = mil_affine(mil_matmul_t(mili_split_heads(parts->q_marks, H), mili_split_heads(parts->k, H), 0, 1), scale, 0);      // [B, H, m, n']
    mil_node *lse = mili_split_heads(parts->pool->second, H);                                  // [B, H, m, 1]
    mil_node *w = mil_matmul(mil_matmul(a1, parts->inverse), mili_binary(scores, lse, MILI_BINARY_weights, 0));               // [B, H, 1, n']
    if (!w) return NULL;
    shape[0] = w->shape[0];
    shape[1] = H;
    shape[2] = w->cols;
    return mil_slice(mil_reshape(w, 3, shape), 2, parts->padding, w->cols - parts->padding);
}

// ---- PPEG ----
MIL_DEF mil_ppeg_layer mil_declare_ppeg(mil_builder *b, int64_t width, const int64_t *kernels, int count, mil_linear_init init, const char *key, ...)
{
    static const char *const names[3] = { "proj", "proj1", "proj2" };
    mil_ppeg_layer layer;
    MILI_KEY(name, key)
    memset(&layer, 0, sizeof layer);
    if (count < 1 || count > 3) mil_declare_fail(b, MIL_ERROR_ARGUMENT, "%s: %d kernels, 1 to 3 are possible", name, count);
    layer.count = MILI_MAX(0, MILI_MIN(count, 3));
    for (int i = 0; i < layer.count; i++) {
        const int64_t k = kernels[i];
        mil_init w, z;
        int64_t shape[4];
        shape[0] = width;
        shape[1] = 1;
        shape[2] = shape[3] = k;
        if (k < 1 || k % 2 == 0) mil_declare_fail(b, MIL_ERROR_ARGUMENT, "%s.%s: a kernel of %lld; it must be odd", name, names[i], (long long)k);
        w.kind = z.kind = MIL_INIT_UNIFORM;
        w.a = z.a = 1 / (double)MILI_MAX(k, 1);            // 1 / sqrt(k k)
        if (init != MIL_LINEAR_TORCH) {
            w.a = sqrt(6.0 / ((double)MILI_MAX(k * k, 1) * (double)(1 + width)));
            z.kind = MIL_INIT_CONSTANT;
            z.a = 0;
        }
        layer.weight[i] = mil_declare(b, w, 4, shape, "%s.%s.weight", name, names[i]);
        layer.bias[i] = mil_declare(b, z, 1, &width, "%s.%s.bias", name, names[i]);
    }
    return layer;
}

MIL_DEF mil_node *mil_ppeg_forward(const mil_ppeg_layer *layer, mil_node *x, int64_t skip, int64_t width)
{
    mil_node *weight = NULL, *bias = NULL;
    int64_t largest = 1;
    if (!x) return NULL;
    for (int i = 0; i < layer->count; i++) if (layer->weight[i]) largest = MILI_MAX(largest, layer->weight[i]->shape[2]);
    for (int i = 0; i < layer->count; i++) {               // smaller kernels stand in the middle of the largest
        mil_node *w = mil_use(x->tape, layer->weight[i]), *z = mil_use(x->tape, layer->bias[i]);
        if (!w) return NULL;
        const int64_t edge = (largest - w->shape[2]) / 2;
        w = mil_pad(mil_pad(w, 2, edge, edge), 3, edge, edge);
        weight = weight ? mil_add(weight, w) : w;
        bias = bias ? mil_add(bias, z) : z;
    }
    return mil_add(x, mil_conv_tokens(x, weight, bias, skip, width));
}

// ---- regions ----
MIL_DEF mil_node *mil_regions_split(mil_node *x, int64_t side, int64_t region)
{
    static const int axes[6] = { 0, 1, 3, 2, 4, 5 };
    int64_t shape[6];
    if (!x) return NULL;
    if (x->rank != 3 || region < 1 || side < 1 || side % region || side > 1000000 || side * side < x->shape[1])
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "regions: %s on a side of %lld in regions of %lld", MILI_SHAPE(x), (long long)side, (long long)region);
    x = mil_pad(x, 1, 0, side * side - x->shape[1]);
    if (!x) return NULL;
    shape[0] = x->shape[0];
    shape[1] = shape[3] = side / region;
    shape[2] = shape[4] = region;
    shape[5] = x->shape[2];
    x = mil_permute(mil_reshape(x, 6, shape), axes);       // [B, rows of regions, columns of regions, region, region, E]
    shape[0] *= shape[1] * shape[1];
    shape[1] = region * region;
    shape[2] = shape[5];
    return mil_reshape(x, 3, shape);
}

MIL_DEF mil_node *mil_regions_join(mil_node *x, int64_t bags, int64_t side, int64_t region, int64_t rows)
{
    static const int axes[6] = { 0, 1, 3, 2, 4, 5 };
    int64_t shape[6];
    if (!x) return NULL;
    if (x->rank != 3 || bags < 1 || region < 1 || side < 1 || side % region || side > 1000000 || bags > x->shape[0] || x->shape[1] != region * region || x->shape[0] != bags * (side / region) * (side / region) || rows > side * side)
        return mil_tape_fail(x->tape, MIL_ERROR_SHAPE, "regions: %s back to %lld bags on a side of %lld", MILI_SHAPE(x), (long long)bags, (long long)side);
    shape[0] = bags;
    shape[1] = shape[2] = side / region;
    shape[3] = shape[4] = region;
    shape[5] = x->shape[2];
    x = mil_permute(mil_reshape(x, 6, shape), axes);
    shape[1] = side * side;
    shape[2] = shape[5];
    return mil_slice(mil_reshape(x, 3, shape), 1, 0, rows);
}

MIL_DEF mil_region_attention mil_declare_region_attention(mil_builder *b, int64_t in, int64_t heads, int64_t head_dim, int qkv_bias, int64_t epeg, double dropout,
                                                          mil_linear_init init, const char *key, ...)
{
    mil_region_attention layer;
    MILI_KEY(name, key)
    memset(&layer, 0, sizeof layer);
    layer.heads = heads;
    layer.epeg = epeg;
    layer.dropout = dropout;
    layer.qkv = mil_declare_linear(b, in, 3 * heads * head_dim, qkv_bias, init, "%s.qkv", name);
    layer.proj = mil_declare_linear(b, heads * head_dim, in, 1, init, "%s.proj", name);
    if (epeg > 0) {
        mil_init w, z;
        int64_t shape[4];
        shape[0] = heads;
        shape[1] = shape[3] = 1;
        shape[2] = epeg;
        w.kind = z.kind = MIL_INIT_UNIFORM;
        w.a = z.a = 1 / sqrt((double)epeg);
        if (init != MIL_LINEAR_TORCH) {
            w.a = sqrt(6.0 / (double)(epeg * (1 + heads)));
            z.kind = MIL_INIT_CONSTANT;
            z.a = 0;
        }
        layer.pe = mil_declare(b, w, 4, shape, "%s.pe.weight", name);
        layer.pe_bias = mil_declare(b, z, 1, shape, "%s.pe.bias", name);
    }
    return layer;
}

MIL_DEF mil_node *mil_region_attention_forward(const mil_region_attention *layer, mil_node *x)
{
    const int64_t H = layer->heads;
    mil_node *q = mili_stacked_linear(x, layer->qkv.weight, layer->qkv.bias, 0, 3);            // [R, n, H d]
    mil_node *k = mili_stacked_linear(x, layer->qkv.weight, layer->qkv.bias, 1, 3);
    mil_node *v = mili_stacked_linear(x, layer->qkv.weight, layer->qkv.bias, 2, 3), *o;
    if (!q || !k || !v) return NULL;
    if (layer->epeg > 0) {                                 // the scores themselves are needed: [R, H, n, n]
        mil_node *t = mil_matmul_t(mili_split_heads(q, H), mili_split_heads(k, H), 0, 1);
        t = mil_affine(t, 1 / sqrt((double)(q->cols / H)), 0);
        t = mil_add(t, mil_conv_maps(t, mil_use(x->tape, layer->pe), mil_use(x->tape, layer->pe_bias), layer->epeg / 2));
        o = mili_join_heads(mil_matmul(mil_softmax(t, -1), mili_split_heads(v, H)));
    } else o = mil_attention(q, k, v, H, 0, NULL, 0, NULL);
    return mil_dropout(mil_linear_forward(&layer->proj, o), layer->dropout, "attention");
}

// ==== >>json: a strict JSON reader ================================================================================
// mili_json_parse checks a whole text once: RFC 8259, no leniency, UTF-8 valid, no lone surrogates, depth bounded, no
// recursion. After that a value is just its span of the text, and members are found by walking it: nothing is allocated.

typedef struct mili_json { const char *text; size_t size; } mili_json;    // one checked value; size 0: there is none
typedef struct mili_json_iter { const char *at; int object; } mili_json_iter;

#define MILI_JSON_MAX_DEPTH 64                             // one bit per level

// Bytes of the UTF-8 character at `at` (1..4), 0 when it is not one: overlong, a surrogate, above U+10FFFF, cut off.
MILI_FN int mili_utf8_size(const char *at, const char *end)
{
    const unsigned char *s = (const unsigned char *)at;
    const size_t room = (size_t)(end - at);
    if (room >= 1 && s[0] < 0x80) return 1;
    if (room >= 2 && s[0] >= 0xc2 && s[0] < 0xe0 && (s[1] & 0xc0) == 0x80) return 2;
    if (room >= 3 && (s[0] & 0xf0) == 0xe0 && (s[1] & 0xc0) == 0x80 && (s[2] & 0xc0) == 0x80) {
        const int code = (s[0] & 15) << 12 | (s[1] & 63) << 6 | (s[2] & 63);
        return code >= 0x800 && (code < 0xd800 || code > 0xdfff) ? 3 : 0;
    }
    if (room >= 4 && (s[0] & 0xf8) == 0xf0 && (s[1] & 0xc0) == 0x80 && (s[2] & 0xc0) == 0x80 && (s[3] & 0xc0) == 0x80) {
        const int code = (s[0] & 7) << 18 | (s[1] & 63) << 12 | (s[2] & 63) << 6 | (s[3] & 63);
        return code >= 0x10000 && code <= 0x10ffff ? 4 : 0;
    }
    return 0;
}

MILI_FN int mili_utf8_valid(const char *text, size_t size)
{
    const char *end = text + size;
    while (text < end) {
        const int n = mili_utf8_size(text, end);
        if (!n) return 0;
        text += n;
    }
    return 1;
}

// A name from outside, fit for an error sentence: quoted, control characters as '?', cut after 90 bytes.
typedef struct mili_quoted { char text[112]; } mili_quoted;

MILI_FN mili_quoted mili_quote_n(const char *name, size_t size)
{
    mili_quoted q;
    size_t n = 0;
    const char *end = name + size;
    q.text[n++] = '"';
    while (name < end && n < 90) {
        int step = mili_utf8_size(name, end);
        if (step == 0 || (unsigned char)*name < 0x20 || *name == 0x7f) { q.text[n++] = '?'; name++; continue; }
        while (step--) q.text[n++] = *name++;
    }
    memcpy(q.text + n, name < end ? "...\"" : "\"", name < end ? 5 : 2);
    return q;
}

MILI_FN mili_quoted mili_quote(const char *name) { return mili_quote_n(name, strlen(name)); }

// A path for an error sentence: its end, when it is long.
MILI_FN const char *mili_path_tail(const char *path)
{
    const size_t n = strlen(path);
    return n > 300 ? path + (n - 300) : path;
}

MILI_INLINE int mili_json_is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
MILI_INLINE int mili_is_digit(char c) { return c >= '0' && c <= '9'; }

// Four hex digits, or -1.
MILI_FN int mili_json_hex4(const char *at, const char *end)
{
    int code = 0;
    if (end - at < 4) return -1;
    for (int i = 0; i < 4; i++) {
        const char c = at[i];
        if (mili_is_digit(c)) code = code * 16 + (c - '0');
        else if (c >= 'a' && c <= 'f') code = code * 16 + (c - 'a' + 10);
        else if (c >= 'A' && c <= 'F') code = code * 16 + (c - 'A' + 10);
        else return -1;
    }
    return code;
}

// The three checkers move *at past what they accept and return NULL, or leave it at the fault and return what is wrong.
MILI_FN const char *mili_json_check_string(const char **at, const char *end)
{
    const char *s = *at + 1;
    for (;;) {
        *at = s;
        if (s == end) return "a string that does not end";
        if (*s == '"') { *at = s + 1; return NULL; }
        if ((unsigned char)*s < 0x20) return "a control character in a string";
        if (*s != '\\') {
            const int n = mili_utf8_size(s, end);
            if (!n) return "invalid UTF-8";
            s += n;
            continue;
        }
        if (++s == end) return "a string that does not end";
        if (*s != 'u') {
            if (*s == 0 || !strchr("\"\\/bfnrt", *s)) return "an escape that does not exist";
            s++;
            continue;
        }
        const int code = mili_json_hex4(s + 1, end);
        if (code < 0) return "\\u without four hex digits";
        s += 5;
        if (code >= 0xdc00 && code <= 0xdfff) return "a lone surrogate";
        if (code >= 0xd800 && code <= 0xdbff) {
            const int low = end - s >= 6 && s[0] == '\\' && s[1] == 'u' ? mili_json_hex4(s + 2, end) : -1;
            if (low < 0xdc00 || low > 0xdfff) return "a lone surrogate";
            s += 6;
        }
    }
}

MILI_FN const char *mili_json_check_number(const char **at, const char *end)
{
    const char *s = *at;
    const char *why = NULL;
    if (s < end && *s == '-') s++;
    if (s == end || !mili_is_digit(*s)) why = "a number without digits";
    else if (*s == '0' && s + 1 < end && mili_is_digit(s[1])) why = "a number with a leading zero";
    while (s < end && mili_is_digit(*s)) s++;
    if (!why && s < end && *s == '.') {
        s++;
        if (s == end || !mili_is_digit(*s)) why = "a number without digits after the point";
        while (s < end && mili_is_digit(*s)) s++;
    }
    if (!why && s < end && (*s == 'e' || *s == 'E')) {
        s++;
        if (s < end && (*s == '+' || *s == '-')) s++;
        if (s == end || !mili_is_digit(*s)) why = "a number without digits in its exponent";
        while (s < end && mili_is_digit(*s)) s++;
    }
    if (!why) *at = s;
    return why;
}

MILI_FN const char *mili_json_check_word(const char **at, const char *end)
{
    static const char *const words[] = { "true", "false", "null" };
    for (int i = 0; i < MILI_COUNT(words); i++) {
        const size_t n = strlen(words[i]);
        if ((size_t)(end - *at) >= n && memcmp(*at, words[i], n) == 0) { *at += n; return NULL; }
    }
    return "no value: expected an object, array, string, number, true, false or null";
}

// Checks the value at *at, which is left after it or at the fault.
MILI_FN const char *mili_json_check(const char **at, const char *end, int max_depth)
{
    enum { VALUE, FIRST_VALUE, KEY, FIRST_KEY, AFTER } state = VALUE;
    uint64_t objects = 0;                                  // bit d: the container at depth d is an object
    int depth = 0;
    const char *why;
    for (;;) {
        while (*at < end && mili_json_is_space(**at)) ++*at;
        if (*at == end) return "the text ends in the middle of a value";
        const char c = **at;
        const int object = depth > 0 && (objects >> (depth - 1) & 1);
        const int closes = depth > 0 && c == (object ? '}' : ']') && state != VALUE && state != KEY;
        if (closes) {
            ++*at;
            if (--depth == 0) return NULL;
            state = AFTER;
        } else if (state == AFTER) {
            if (c != ',') return object ? "expected , or } after a member" : "expected , or ] after an element";
            ++*at;
            state = object ? KEY : VALUE;
        } else if (state == KEY || state == FIRST_KEY) {
            if (c != '"') return "expected a name in double quotes";
            why = mili_json_check_string(at, end);
            if (why) return why;
            while (*at < end && mili_json_is_space(**at)) ++*at;
            if (*at == end || **at != ':') return "expected : after a name";
            ++*at;
            state = VALUE;
        } else if (c == '{' || c == '[') {
            if (depth == max_depth) return "nested too deep";
            objects = (objects & ~((uint64_t)1 << depth)) | (uint64_t)(c == '{') << depth;
            depth++;
            ++*at;
            state = c == '{' ? FIRST_KEY : FIRST_VALUE;
        } else {
            if (c == '"') why = mili_json_check_string(at, end);
            else if (c == '-' || mili_is_digit(c)) why = mili_json_check_number(at, end);
            else why = mili_json_check_word(at, end);
            if (why) return why;
            if (depth == 0) return NULL;
            state = AFTER;
        }
    }
}

// Checks `text` and gives its one value; max_depth counts nested containers, at most MILI_JSON_MAX_DEPTH.
// `what` starts the error sentence. Errors: MIL_ERROR_FORMAT.
MILI_FN mil_status mili_json_parse(mil_context *ctx, const char *what, const char *text, size_t size, int max_depth, mili_json *out)
{
    const char *at = text, *end = text + size;
    while (at < end && mili_json_is_space(*at)) at++;
    const char *start = at, *why;
    out->text = NULL;
    out->size = 0;
    if (at == end) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: JSON: empty", what);
    why = mili_json_check(&at, end, MILI_MIN(max_depth, MILI_JSON_MAX_DEPTH));
    const char *stop = at;
    if (!why) {
        while (at < end && mili_json_is_space(*at)) at++;
        if (at < end) why = "something follows the value";
    }
    if (why) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: JSON: byte %llu: %s", what, (unsigned long long)(at - text), why);
    out->text = start;
    out->size = (size_t)(stop - start);
    return MIL_OK;
}

// '{' '[' '"' 't' (true) 'f' (false) 'n' (null) '0' (a number), or 0 for no value.
MILI_FN char mili_json_kind(mili_json v)
{
    if (!v.size) return 0;
    return v.text[0] == '-' || mili_is_digit(v.text[0]) ? '0' : v.text[0];
}

// The end of the checked string, object or array at `at`.
MILI_FN const char *mili_json_skip(const char *at)
{
    int64_t depth = 0;
    do {
        if (*at == '"') {
            for (at++; *at != '"'; at++) {
                if (*at == '\\') at++;
            }
            at++;
        } else if (*at == '{' || *at == '[') {
            depth++;
            at++;
        } else if (*at == '}' || *at == ']') {
            depth--;
            at++;
        } else {
            at++;
        }
    } while (depth);
    return at;
}

// Walks the members of an object or the elements of an array (key is then empty):
//     mili_json_iter it = mili_json_begin(v);
//     while (mili_json_next(&it, &key, &value)) ...
// Anything else has no members.
MILI_FN mili_json_iter mili_json_begin(mili_json v)
{
    mili_json_iter it;
    const char kind = mili_json_kind(v);
    it.object = kind == '{';
    it.at = kind == '{' || kind == '[' ? v.text + 1 : NULL;
    return it;
}

MILI_FN int mili_json_next(mili_json_iter *it, mili_json *key, mili_json *value)
{
    const char *at = it->at;
    if (!at) return 0;
    while (mili_json_is_space(*at) || *at == ',') at++;
    key->text = NULL;
    key->size = 0;
    if (*at == '}' || *at == ']') { it->at = NULL; return 0; }
    if (it->object) {
        key->text = at;
        at = mili_json_skip(at);
        key->size = (size_t)(at - key->text);
        while (mili_json_is_space(*at) || *at == ':') at++;
    }
    value->text = at;
    if (*at == '"' || *at == '{' || *at == '[') at = mili_json_skip(at);
    else while (*at != ',' && *at != '}' && *at != ']' && !mili_json_is_space(*at)) at++;
    value->size = (size_t)(at - value->text);
    it->at = at;
    return 1;
}

MILI_FN int64_t mili_json_count(mili_json v)
{
    mili_json key, value;
    mili_json_iter it = mili_json_begin(v);
    int64_t n = 0;
    while (mili_json_next(&it, &key, &value)) n++;
    return n;
}

// The next character of a checked string as UTF-8 in out[4]; returns its bytes, 0 at the closing quote.
MILI_FN int mili_json_char(const char **at, char *out)
{
    const char *s = *at;
    uint32_t code;
    if (*s == '"') return 0;
    out[0] = *s;
    if (*s != '\\') { *at = s + 1; return 1; }             // UTF-8 goes through byte by byte
    *at = s + 2;
    switch (s[1]) {
    case 'b': out[0] = '\b'; return 1;
    case 'f': out[0] = '\f'; return 1;
    case 'n': out[0] = '\n'; return 1;
    case 'r': out[0] = '\r'; return 1;
    case 't': out[0] = '\t'; return 1;
    case 'u': break;
    default: out[0] = s[1]; return 1;
    }
    code = (uint32_t)mili_json_hex4(s + 2, s + 6);
    *at = s + 6;
    if (code >= 0xd800 && code <= 0xdbff) {
        code = 0x10000 + ((code - 0xd800) << 10) + ((uint32_t)mili_json_hex4(s + 8, s + 12) - 0xdc00);
        *at = s + 12;
    }
    if (code < 0x80) { out[0] = (char)code; return 1; }
    if (code < 0x800) {
        out[0] = (char)(0xc0 | code >> 6);
        out[1] = (char)(0x80 | (code & 63));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xe0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 63));
        out[2] = (char)(0x80 | (code & 63));
        return 3;
    }
    out[0] = (char)(0xf0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 63));
    out[2] = (char)(0x80 | (code >> 6 & 63));
    out[3] = (char)(0x80 | (code & 63));
    return 4;
}

// Unescapes a string into dst, which is ended by 0; returns its bytes without the 0. When `room` is too small (or dst NULL)
// nothing but an empty string is written. has_nul, unless NULL, says whether the text holds \u0000, where C would end it.
MILI_FN size_t mili_json_copy(mili_json v, char *dst, size_t room, int *has_nul)
{
    size_t size = 0;
    if (has_nul) *has_nul = 0;
    if (dst && room) dst[0] = 0;
    if (mili_json_kind(v) != '"') return 0;
    for (int pass = 0; pass < 2; pass++) {                 // the first pass measures
        const char *at = v.text + 1;
        char c[4];
        int n;
        if (pass && (!dst || size >= room)) break;
        size = 0;
        while ((n = mili_json_char(&at, c)) != 0) {
            if (has_nul && c[0] == 0) *has_nul = 1;
            if (pass) memcpy(dst + size, c, (size_t)n);
            size += (size_t)n;
        }
        if (pass) dst[size] = 0;
    }
    return size;
}

// Is it a string, and this text after unescaping?
MILI_FN int mili_json_equal(mili_json v, const char *text)
{
    const char *at = v.text + 1;
    char c[4];
    int n;
    if (mili_json_kind(v) != '"') return 0;
    while ((n = mili_json_char(&at, c)) != 0) {
        for (int i = 0; i < n; i++, text++) {
            if (*text == 0 || *text != c[i]) return 0;
        }
    }
    return *text == 0;
}

// Member of an object by name, the first one; size 0 when there is none.
MILI_FN mili_json mili_json_find(mili_json object, const char *name)
{
    mili_json key, value, none = { NULL, 0 };
    mili_json_iter it = mili_json_begin(object);
    while (it.object && mili_json_next(&it, &key, &value)) {
        if (mili_json_equal(key, name)) return value;
    }
    return none;
}

// An integer written as one: no point, no exponent, no "-0", and in range. 1 when it is.
MILI_FN int mili_json_int(mili_json v, int64_t *out)
{
    const int minus = v.size > 0 && v.text[0] == '-';
    uint64_t u = 0;
    const uint64_t top = minus ? (uint64_t)INT64_MAX + 1 : (uint64_t)INT64_MAX;
    if (mili_json_kind(v) != '0' || (minus && v.text[1] == '0')) return 0;
    for (size_t i = (size_t)minus; i < v.size; i++) {
        if (!mili_is_digit(v.text[i])) return 0;
        const uint64_t digit = (uint64_t)(v.text[i] - '0');
        if (u > (top - digit) / 10) return 0;
        u = u * 10 + digit;
    }
    *out = !minus ? (int64_t)u : u == top ? INT64_MIN : -(int64_t)u;
    return 1;
}

// ---- decimal to double, correctly rounded and the same in every locale ----
// digits * 10^exponent as a big integer, then its top 53 bits; what is cut off by division is kept as one sticky bit.
typedef struct mili_big { uint32_t word[240]; int count; } mili_big;       // 84 words for 800 digits, 145 more for the quotient

MILI_FN void mili_big_multiply_add(mili_big *b, uint32_t factor, uint32_t add)
{
    uint64_t carry = add;
    for (int i = 0; i < b->count; i++) {
        carry += (uint64_t)b->word[i] * factor;
        b->word[i] = (uint32_t)carry;
        carry >>= 32;
    }
    if (carry) b->word[b->count++] = (uint32_t)carry;
}

MILI_FN uint32_t mili_big_divide(mili_big *b, uint32_t divisor)            // returns the remainder
{
    uint64_t rest = 0;
    for (int i = b->count - 1; i >= 0; i--) {
        rest = rest << 32 | b->word[i];
        b->word[i] = (uint32_t)(rest / divisor);
        rest %= divisor;
    }
    while (b->count && !b->word[b->count - 1]) b->count--;
    return (uint32_t)rest;
}

// text: a number by JSON's grammar, already checked, `size` bytes. 0 when it is too large for a double.
MILI_FN int mili_parse_double(const char *text, size_t size, double *out)
{
    const char *s = text, *end = text + size;
    const int minus = s < end && *s == '-';
    int64_t exponent = 0, digits = 0, written = 0;
    int sticky = 0, point = 0;
    mili_big b;
    b.count = 0;
    if (minus) s++;
    for (; s < end && (mili_is_digit(*s) || *s == '.'); s++) {
        if (*s == '.') { point = 1; continue; }
        if (digits == 0 && *s == '0') { exponent -= point; continue; }
        if (digits < 800) {                                // 768 digits decide any rounding; the rest can only break a tie
            mili_big_multiply_add(&b, 10, (uint32_t)(*s - '0'));
            digits++;
            exponent -= point;
        } else {
            sticky |= *s != '0';
            exponent += !point;
        }
    }
    if (s < end) {                                         // e or E
        const int down = s[1] == '-';
        for (s += 1 + (s[1] == '-' || s[1] == '+'); s < end; s++) {
            if (written < 100000000000000000) written = written * 10 + (*s - '0');
        }
        exponent += down ? -written : written;
    }
    *out = minus ? -0.0 : 0.0;
    if (digits == 0 || exponent + digits < -330) return 1;
    if (exponent + digits > 310) return 0;

    int shift = 0;                                         // the value is b * 2^-shift
    if (exponent < 0) {
        // Four bits of room per division by 10 (it takes 3.3), and 96 for the 53 bits wanted; -exponent is at most 1130.
        const int words = (int)(-exponent * 4 / 32) + 3;
        memmove(b.word + words, b.word, (size_t)b.count * sizeof b.word[0]);
        memset(b.word, 0, (size_t)words * sizeof b.word[0]);
        b.count += words;
        shift = words * 32;
        for (; exponent < 0; exponent++) sticky |= mili_big_divide(&b, 10) != 0;
    }
    for (; exponent > 0; exponent--) mili_big_multiply_add(&b, 10, 0);

    int bits = b.count * 32;
    while (!(b.word[(bits - 1) / 32] >> ((bits - 1) % 32) & 1)) bits--;
    const int top = bits - 1 - shift;                      // 2^top <= value < 2^(top + 1)
    const int keep = top >= -1022 ? 53 : 53 - (-1022 - top);                // fewer for a subnormal
    uint64_t mantissa = 0;
    int half = 0;
    if (keep < 0) return 1;
    for (int i = bits - 1; i >= 0; i--) {
        const int bit = (int)(b.word[i / 32] >> (i % 32) & 1), place = bits - 1 - i;
        if (place < keep) mantissa = mantissa << 1 | (uint64_t)bit;
        else if (place == keep) half = bit;
        else sticky |= bit;
    }
    for (int place = bits; place < keep; place++) mantissa <<= 1;
    if (half && (sticky || (mantissa & 1))) mantissa++;
    const double value = ldexp((double)mantissa, top - (keep - 1));
    if (!mili_is_finite_f64(value)) return 0;
    *out = minus ? -value : value;
    return 1;
}

// Any JSON number that a double can hold. 1 when it is one.
MILI_FN int mili_json_double(mili_json v, double *out)
{
    return mili_json_kind(v) == '0' && mili_parse_double(v.text, v.size, out);
}

MILI_FN int mili_json_bool(mili_json v, int *out)
{
    const char kind = mili_json_kind(v);
    if (kind != 't' && kind != 'f') return 0;
    *out = kind == 't';
    return 1;
}

MILI_FN int mili_json_is_null(mili_json v) { return mili_json_kind(v) == 'n'; }

// An array of integers: up to `room` of them in dst (NULL: none), *count is how many it has. 1 when it is such an array.
MILI_FN int mili_json_ints(mili_json v, int64_t *dst, int64_t room, int64_t *count)
{
    mili_json key, value;
    mili_json_iter it = mili_json_begin(v);
    int64_t x = 0;
    *count = 0;
    if (mili_json_kind(v) != '[') return 0;
    while (mili_json_next(&it, &key, &value)) {
        if (!mili_json_int(value, &x)) return 0;
        if (dst && *count < room) dst[*count] = x;
        ++*count;
    }
    return 1;
}

// Compares the unescaped bytes of two strings, as memcmp would.
MILI_FN int mili_json_compare(mili_json a, mili_json b)
{
    const char *p = a.text + 1, *q = b.text + 1;
    char c[4], d[4];
    int n = 0, m = 0, i = 0, j = 0;
    for (;;) {
        if (i == n) { n = mili_json_char(&p, c); i = 0; }
        if (j == m) { m = mili_json_char(&q, d); j = 0; }
        if (!n || !m) return (n != 0) - (m != 0);
        if (c[i] != d[j]) return (unsigned char)c[i] < (unsigned char)d[j] ? -1 : 1;
        i++;
        j++;
    }
}

// Sorts indices by compare(arg, index[i], index[j]): heapsort, so no recursion, no memory, n log n at worst.
MILI_FN void mili_index_sort(int64_t *index, int64_t count, int (*compare)(const void *arg, int64_t a, int64_t b), const void *arg)
{
    int64_t start = count / 2, end = count;
    while (end > 1) {
        int64_t value, hole, child;
        if (start > 0) value = index[--start];             // building the heap
        else { value = index[--end]; index[end] = index[0]; }
        for (hole = start; (child = 2 * hole + 1) < end; hole = child) {
            if (child + 1 < end && compare(arg, index[child], index[child + 1]) < 0) child++;
            if (compare(arg, value, index[child]) >= 0) break;
            index[hole] = index[child];
        }
        index[hole] = value;
    }
}

MILI_FN int mili_json_compare_keys(const void *arg, int64_t a, int64_t b)
{
    const mili_json *keys = (const mili_json *)arg;
    return mili_json_compare(keys[a], keys[b]);
}

// Names inside an object must differ, also after unescaping. `what` and, unless NULL, `inside` (another name) start the sentence.
MILI_FN mil_status mili_json_check_unique(mil_context *ctx, const char *what, mili_json object)
{
    const int64_t n = mili_json_count(object);
    mili_json key, value;
    mili_json_iter it = mili_json_begin(object);
    mil_status status = MIL_OK;
    int64_t i = 0;
    size_t key_bytes, index_bytes;
    if (n < 2 || mili_json_kind(object) != '{') return MIL_OK;
    if (!mili_mul_size((size_t)n, sizeof(mili_json), &key_bytes) || !mili_mul_size((size_t)n, sizeof(int64_t), &index_bytes))
        return mili_fail(ctx, MIL_ERROR_NO_MEMORY, "%s: no memory for %lld names", what, (long long)n);
    mili_json *keys = (mili_json *)mili_alloc(ctx, key_bytes);
    int64_t *index = (int64_t *)mili_alloc(ctx, index_bytes);
    if (!keys || !index) { status = MIL_ERROR_NO_MEMORY; goto done; }
    while (mili_json_next(&it, &key, &value)) { keys[i] = key; index[i] = i; i++; }
    mili_index_sort(index, n, mili_json_compare_keys, keys);
    for (i = 1; i < n; i++) {
        if (mili_json_compare(keys[index[i - 1]], keys[index[i]]) != 0) continue;
        key = keys[index[i]];
        status = mili_fail(ctx, MIL_ERROR_FORMAT, "%s: JSON: the name %s occurs twice", what,
                           mili_quote_n(key.text + 1, key.size - 2).text);
        break;
    }
done:
    mili_free(ctx, keys, key_bytes);
    mili_free(ctx, index, index_bytes);
    return status;
}

// ---- writing JSON ----

// Escapes one byte of UTF-8 as the reference writers do; returns the bytes put into out[6].
MILI_FN int mili_json_escape(char c, char *out)
{
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt", hex[] = "0123456789abcdef";
    const char *special = c ? strchr(from, c) : NULL;
    if (special) { out[0] = '\\'; out[1] = to[special - from]; return 2; }
    if ((unsigned char)c >= 0x20) { out[0] = c; return 1; }
    memcpy(out, "\\u00", 4);
    out[4] = hex[(unsigned char)c >> 4];
    out[5] = hex[c & 15];
    return 6;
}

// Writes text as a JSON string with its quotes, like snprintf: at most `room` bytes with the final 0; returns the length needed.
MILI_FN size_t mili_json_string(char *dst, size_t room, const char *text)
{
    size_t n = 0;
    char c[6];
    for (int part = 0; part < 3; part++) {
        const char *s = part == 1 ? text : "\"";
        for (; *s; s++) {
            int m = 1;
            if (part == 1) m = mili_json_escape(*s, c); else c[0] = *s;
            for (int i = 0; i < m; i++, n++) {
                if (n + 1 < room) dst[n] = c[i];
            }
        }
    }
    if (room) dst[MILI_MIN(n, room - 1)] = 0;
    return n;
}

// The shortest of 15 to 17 digits that reads back as the same double, with a point in every locale. Finite x only.
MILI_FN void mili_json_number(char *dst, double x)         // dst[32]
{
    for (int digits = 15; digits <= 17; digits++) {
        double back = 0;
        int n = 0;
        char text[48];
        snprintf(text, sizeof text, "%.*g", digits, x);
        for (const char *s = text; *s && n < 31; s++) {    // whatever is not part of a number is the locale's point
            if (mili_is_digit(*s) || strchr("+-e", *s)) dst[n++] = *s;
            else if (n == 0 || dst[n - 1] != '.') dst[n++] = '.';
        }
        dst[n] = 0;
        if (mili_parse_double(dst, (size_t)n, &back) && memcmp(&back, &x, sizeof x) == 0) return;
    }
}

// ==== >>file-code: bytes on disk, safetensors, NPY ================================================================

// Both formats are little-endian. The test is a macro so that the swapping path can be tested on any machine.
#ifndef MILI_BIG_ENDIAN
#if defined(__BYTE_ORDER__) && defined(__ORDER_BIG_ENDIAN__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define MILI_BIG_ENDIAN 1
#else
#define MILI_BIG_ENDIAN 0
#endif
#endif

MILI_FN uint64_t mili_read_le(const unsigned char *at, int bytes)
{
    uint64_t u = 0;
    for (int i = bytes - 1; i >= 0; i--) u = u << 8 | at[i];
    return u;
}

// dst = src with the bytes of each element reversed; the two may be the same memory.
MILI_FN void mili_swap_copy(void *dst, const void *src, size_t bytes, size_t element)
{
    unsigned char *d = (unsigned char *)dst;
    const unsigned char *s = (const unsigned char *)src;
    for (size_t i = 0; i + element <= bytes; i += element) {
        for (size_t a = 0, b = element - 1; a <= b; a++, b--) {
            const unsigned char low = s[i + a], high = s[i + b];
            d[i + a] = high;
            d[i + b] = low;
            if (b == 0) break;
        }
    }
}

#ifndef MIL_NO_STDIO
// ---- the operating system ----
// A dozen calls, each behind a macro so that the tests can make the n-th one fail. Results are 0 or a code for mili_os_text.

enum { MILI_OS_FOLDER = -1, MILI_OS_NOT_FILE = -2, MILI_OS_SHRANK = -3, MILI_OS_EXISTS = -4, MILI_OS_TOO_LARGE = -5,
       MILI_OS_BAD_PATH = -6, MILI_OS_SHORT_WRITE = -7, MILI_OS_UNKNOWN = -8 };

#if MILI_POSIX && !defined(MILI_OS_STDIO)
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
#if defined(__GLIBC__) && defined(__STRICT_ANSI__) && !defined(__cplusplus)
int fsync(int fd);                                         // in libc, but hidden from -std=c99
#ifndef __cplusplus
int fchmod(int fd, mode_t mode);
#endif
#endif
#ifndef O_CLOEXEC
#define MILI_O_CLOEXEC 0
#else
#define MILI_O_CLOEXEC O_CLOEXEC
#endif
#ifndef MILI_OS_OPEN
#define MILI_OS_OPEN(path, flags, mode) open(path, flags, mode)
#endif
#ifndef MILI_OS_STAT
#define MILI_OS_STAT(path, info) stat(path, info)
#endif
#ifndef MILI_OS_FSTAT
#define MILI_OS_FSTAT(fd, info) fstat(fd, info)
#endif
#ifndef MILI_OS_READ
#define MILI_OS_READ(fd, dst, size) read(fd, dst, size)
#endif
#ifndef MILI_OS_WRITE
#define MILI_OS_WRITE(fd, src, size) write(fd, src, size)
#endif
#ifndef MILI_OS_SYNC
#define MILI_OS_SYNC(fd) fsync(fd)
#endif
#ifndef MILI_OS_CLOSE
#define MILI_OS_CLOSE(fd) close(fd)
#endif
#ifndef MILI_OS_RENAME
#define MILI_OS_RENAME(from, to) rename(from, to)
#endif
#ifndef MILI_OS_REMOVE
#define MILI_OS_REMOVE(path) unlink(path)
#endif
#ifndef MILI_OS_MAP
#define MILI_OS_MAP(fd, size) mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0)
#endif
#ifndef MILI_OS_UNMAP
#define MILI_OS_UNMAP(at, size) munmap(at, size)
#endif

typedef int mili_fd;

MILI_FN long mili_os_error(void) { return errno > 0 ? (long)errno : (long)MILI_OS_UNKNOWN; }
MILI_FN const char *mili_os_message(long code, char *dst, size_t room)
{
    MILI_UNUSED(dst);
    MILI_UNUSED(room);
    return strerror((int)code);
}

MILI_FN long mili_os_open(const char *path, mili_fd *fd, uint64_t *size)
{
    struct stat info;
    do *fd = MILI_OS_OPEN(path, O_RDONLY | O_NONBLOCK | MILI_O_CLOEXEC, 0); while (*fd < 0 && errno == EINTR);  // a pipe must not block
    if (*fd < 0) return mili_os_error();
    long code = 0;
    if (MILI_OS_FSTAT(*fd, &info) != 0) code = mili_os_error();
    else if (S_ISDIR(info.st_mode)) code = MILI_OS_FOLDER;
    else if (!S_ISREG(info.st_mode)) code = MILI_OS_NOT_FILE;
    else *size = (uint64_t)info.st_size;
    if (code) MILI_OS_CLOSE(*fd);
    return code;
}

MILI_FN long mili_os_read(mili_fd fd, void *dst, size_t size)
{
    char *at = (char *)dst;
    while (size) {
        const ssize_t n = MILI_OS_READ(fd, at, MILI_MIN(size, (size_t)1 << 30));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return mili_os_error();
        if (n == 0) return MILI_OS_SHRANK;
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

MILI_FN void *mili_os_map(mili_fd fd, size_t size)
{
    void *at = MILI_OS_MAP(fd, size);
    return at == MAP_FAILED ? NULL : at;
}

MILI_FN void mili_os_unmap(void *at, size_t size) { MILI_OS_UNMAP(at, size); }
MILI_FN void mili_os_close_read(mili_fd fd) { MILI_OS_CLOSE(fd); }

// Creates a file that must not exist; `like` is the file it will replace, whose permissions it gets. When that exists it
// must be a regular file: renaming over a device or a folder is never what was meant.
MILI_FN long mili_os_create(const char *path, const char *like, mili_fd *fd)
{
    struct stat info;
    mode_t mode = 0666;
    const int exists = MILI_OS_STAT(like, &info) == 0;
    if (exists) {
        if (S_ISDIR(info.st_mode)) return MILI_OS_FOLDER;
        if (!S_ISREG(info.st_mode)) return MILI_OS_NOT_FILE;
        mode = info.st_mode & 0777;
    }
    do *fd = MILI_OS_OPEN(path, O_WRONLY | O_CREAT | O_EXCL | MILI_O_CLOEXEC, mode); while (*fd < 0 && errno == EINTR);
    if (*fd < 0) return errno == EEXIST ? (long)MILI_OS_EXISTS : mili_os_error();
    if (exists && fchmod(*fd, mode) != 0) errno = 0;       // the umask does not count here; where it cannot be set, it does
    return 0;
}

MILI_FN long mili_os_write(mili_fd fd, const void *src, size_t size)
{
    const char *at = (const char *)src;
    while (size) {
        const ssize_t n = MILI_OS_WRITE(fd, at, MILI_MIN(size, (size_t)1 << 30));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return mili_os_error();
        if (n == 0) return MILI_OS_SHORT_WRITE;
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

MILI_FN long mili_os_sync(mili_fd fd)
{
    int result;
    do result = MILI_OS_SYNC(fd); while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : mili_os_error();
}

MILI_FN long mili_os_close(mili_fd fd) { return MILI_OS_CLOSE(fd) == 0 || errno == EINTR ? 0 : mili_os_error(); }
MILI_FN void mili_os_remove(const char *path) { MILI_OS_REMOVE(path); }
MILI_FN long mili_os_rename(const char *from, const char *to) { return MILI_OS_RENAME(from, to) == 0 ? 0 : mili_os_error(); }
MILI_FN unsigned long mili_os_process(void) { return (unsigned long)getpid(); }

// The folder's entry is on the disk only after the folder itself is flushed. `scratch` holds strlen(path) + 2 bytes. Some
// file systems cannot flush a folder (EINVAL), and one may be writable but not readable (EACCES): no more can be done there.
MILI_FN long mili_os_sync_folder(const char *path, char *scratch)
{
    const char *slash = strrchr(path, '/');
    const size_t n = slash ? (size_t)(slash - path) + (slash == path) : 1;
    memcpy(scratch, slash ? path : ".", n);
    scratch[n] = 0;
    const int fd = MILI_OS_OPEN(scratch, O_RDONLY | MILI_O_CLOEXEC, 0);
    if (fd < 0) return errno == EACCES ? 0 : mili_os_error();
    long code = mili_os_sync(fd);
    if (code == EINVAL) code = 0;
    const long closed = mili_os_close(fd);
    return code ? code : closed;
}

#elif MILI_WINDOWS && !defined(MILI_OS_STDIO)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>

typedef HANDLE mili_fd;
#define MILI_OS_PATH 1024                                  // UTF-16 units of the longest path
typedef struct mili_wide { WCHAR text[MILI_OS_PATH]; } mili_wide;

MILI_FN long mili_os_error(void)
{
    const long code = (long)GetLastError();
    return code > 0 ? code : (long)MILI_OS_UNKNOWN;
}

MILI_FN const char *mili_os_message(long code, char *dst, size_t room)
{
    if (code == ERROR_FILE_NOT_FOUND || code == ERROR_PATH_NOT_FOUND) return "no such file or folder";
    if (code == ERROR_ACCESS_DENIED || code == ERROR_SHARING_VIOLATION) return "access denied";
    if (code == ERROR_DISK_FULL || code == ERROR_HANDLE_DISK_FULL) return "no space left on the disk";
    snprintf(dst, room, "Windows error %ld", code);
    return dst;
}

MILI_FN int mili_os_wide(const char *path, mili_wide *wide)
{
    return MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide->text, MILI_OS_PATH) > 0;
}

MILI_FN long mili_os_open(const char *path, mili_fd *fd, uint64_t *size)
{
    mili_wide wide;
    LARGE_INTEGER length;
    if (!mili_os_wide(path, &wide)) return MILI_OS_BAD_PATH;
    const DWORD attributes = GetFileAttributesW(wide.text);
    if (attributes == INVALID_FILE_ATTRIBUTES) return mili_os_error();
    if (attributes & FILE_ATTRIBUTE_DIRECTORY) return MILI_OS_FOLDER;
    *fd = CreateFileW(wide.text, GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    if (*fd == INVALID_HANDLE_VALUE) return mili_os_error();
    long code = 0;
    if (GetFileType(*fd) != FILE_TYPE_DISK) code = MILI_OS_NOT_FILE;
    else if (!GetFileSizeEx(*fd, &length)) code = mili_os_error();
    else *size = (uint64_t)length.QuadPart;
    if (code) CloseHandle(*fd);
    return code;
}

MILI_FN long mili_os_read(mili_fd fd, void *dst, size_t size)
{
    char *at = (char *)dst;
    while (size) {
        DWORD n = 0;
        if (!ReadFile(fd, at, (DWORD)MILI_MIN(size, (size_t)1 << 30), &n, NULL)) return mili_os_error();
        if (n == 0) return MILI_OS_SHRANK;
        at += n;
        size -= n;
    }
    return 0;
}

MILI_FN void *mili_os_map(mili_fd fd, size_t size)
{
    MILI_UNUSED(size);
    const HANDLE mapping = CreateFileMappingW(fd, NULL, PAGE_READONLY, 0, 0, NULL);
    if (!mapping) return NULL;
    void *at = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, size);
    CloseHandle(mapping);                                  // the view keeps it
    return at;
}

MILI_FN void mili_os_unmap(void *at, size_t size)
{
    MILI_UNUSED(size);
    UnmapViewOfFile(at);
}

MILI_FN void mili_os_close_read(mili_fd fd) { CloseHandle(fd); }

MILI_FN long mili_os_create(const char *path, const char *like, mili_fd *fd)
{
    mili_wide wide;
    if (!mili_os_wide(like, &wide)) return MILI_OS_BAD_PATH;
    const DWORD attributes = GetFileAttributesW(wide.text);
    if (attributes != INVALID_FILE_ATTRIBUTES && (attributes & FILE_ATTRIBUTE_DIRECTORY)) return MILI_OS_FOLDER;
    if (!mili_os_wide(path, &wide)) return MILI_OS_BAD_PATH;
    *fd = CreateFileW(wide.text, GENERIC_WRITE, 0, NULL, CREATE_NEW, FILE_ATTRIBUTE_NORMAL, NULL);
    if (*fd != INVALID_HANDLE_VALUE) return 0;
    return GetLastError() == ERROR_FILE_EXISTS ? (long)MILI_OS_EXISTS : mili_os_error();
}

MILI_FN long mili_os_write(mili_fd fd, const void *src, size_t size)
{
    const char *at = (const char *)src;
    while (size) {
        DWORD n = 0;
        if (!WriteFile(fd, at, (DWORD)MILI_MIN(size, (size_t)1 << 30), &n, NULL)) return mili_os_error();
        if (n == 0) return MILI_OS_SHORT_WRITE;
        at += n;
        size -= n;
    }
    return 0;
}

MILI_FN long mili_os_sync(mili_fd fd) { return FlushFileBuffers(fd) ? 0 : mili_os_error(); }
MILI_FN long mili_os_close(mili_fd fd) { return CloseHandle(fd) ? 0 : mili_os_error(); }

MILI_FN void mili_os_remove(const char *path)
{
    mili_wide wide;
    if (mili_os_wide(path, &wide)) DeleteFileW(wide.text);
}

MILI_FN long mili_os_rename(const char *from, const char *to)
{
    mili_wide a, b;
    if (!mili_os_wide(from, &a) || !mili_os_wide(to, &b)) return MILI_OS_BAD_PATH;
    return MoveFileExW(a.text, b.text, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) ? 0 : mili_os_error();
}

MILI_FN unsigned long mili_os_process(void) { return (unsigned long)GetCurrentProcessId(); }
MILI_FN long mili_os_sync_folder(const char *path, char *scratch)          // MOVEFILE_WRITE_THROUGH has done it
{
    MILI_UNUSED(path);
    MILI_UNUSED(scratch);
    return 0;
}

#else
// Plain C: no mapping, and no way to ask for the disk itself; rename replaces where the platform's does.
#include <errno.h>
typedef FILE *mili_fd;

MILI_FN long mili_os_error(void) { return errno > 0 ? (long)errno : (long)MILI_OS_UNKNOWN; }
MILI_FN const char *mili_os_message(long code, char *dst, size_t room)
{
    MILI_UNUSED(dst);
    MILI_UNUSED(room);
    return strerror((int)code);
}

MILI_FN long mili_os_open(const char *path, mili_fd *fd, uint64_t *size)
{
    errno = 0;
    *fd = fopen(path, "rb");
    if (!*fd) return mili_os_error();
    if (fseek(*fd, 0, SEEK_END) == 0) {
        const long end = ftell(*fd);
        if (end >= 0 && end < LONG_MAX && fseek(*fd, 0, SEEK_SET) == 0) { *size = (uint64_t)end; return 0; }
    }
    fclose(*fd);
    return MILI_OS_NOT_FILE;
}

MILI_FN long mili_os_read(mili_fd fd, void *dst, size_t size)
{
    errno = 0;
    if (fread(dst, 1, size, fd) == size) return 0;
    return ferror(fd) ? mili_os_error() : (long)MILI_OS_SHRANK;
}

MILI_FN void *mili_os_map(mili_fd fd, size_t size)
{
    MILI_UNUSED(fd);
    MILI_UNUSED(size);
    return NULL;
}

MILI_FN void mili_os_unmap(void *at, size_t size)
{
    MILI_UNUSED(at);
    MILI_UNUSED(size);
}

MILI_FN void mili_os_close_read(mili_fd fd) { fclose(fd); }

MILI_FN long mili_os_create(const char *path, const char *like, mili_fd *fd)
{
    MILI_UNUSED(like);
    errno = 0;
    *fd = fopen(path, "rb");                               // C99 has no exclusive creation
    if (*fd) { fclose(*fd); return MILI_OS_EXISTS; }
    *fd = fopen(path, "wb");
    return *fd ? 0 : mili_os_error();
}

MILI_FN long mili_os_write(mili_fd fd, const void *src, size_t size)
{
    errno = 0;
    return fwrite(src, 1, size, fd) == size ? 0 : mili_os_error();
}

MILI_FN long mili_os_sync(mili_fd fd) { return fflush(fd) == 0 ? 0 : mili_os_error(); }
MILI_FN long mili_os_close(mili_fd fd) { return fclose(fd) == 0 ? 0 : mili_os_error(); }
MILI_FN void mili_os_remove(const char *path) { remove(path); }
MILI_FN long mili_os_rename(const char *from, const char *to) { return rename(from, to) == 0 ? 0 : mili_os_error(); }
MILI_FN unsigned long mili_os_process(void) { return 0; }
MILI_FN long mili_os_sync_folder(const char *path, char *scratch)
{
    MILI_UNUSED(path);
    MILI_UNUSED(scratch);
    return 0;
}
#endif

MILI_FN const char *mili_os_text(long code, char *dst, size_t room)
{
    switch (code) {
    case MILI_OS_FOLDER:      return "it is a folder, not a file";
    case MILI_OS_NOT_FILE:    return "it is not a regular file (a pipe or a device?)";
    case MILI_OS_SHRANK:      return "it became shorter while it was read";
    case MILI_OS_EXISTS:      return "no name is free for a temporary file beside it";
    case MILI_OS_TOO_LARGE:   return "it is larger than this machine's address space";
    case MILI_OS_BAD_PATH:    return "the path is not UTF-8, or too long";
    case MILI_OS_SHORT_WRITE: return "the system wrote less than asked";
    case MILI_OS_UNKNOWN:     return "the system gave no reason";
    default:                  return mili_os_message(code, dst, room);
    }
}

MILI_FN mil_status mili_fail_os(mil_context *ctx, const char *path, const char *doing, long code)
{
    char text[64];
    return mili_fail(ctx, MIL_ERROR_IO, "%s: cannot %s: %s", mili_path_tail(path), doing, mili_os_text(code, text, sizeof text));
}

// ---- files as bytes ----

struct mil_file {
    mil_context *ctx;
    void  *data;
    size_t size;
    int    mapped;
};

MIL_DEF const void *mil_file_data(const mil_file *file) { return file ? file->data : NULL; }
MIL_DEF size_t mil_file_size(const mil_file *file) { return file ? file->size : 0; }

MIL_DEF void mil_file_free(mil_file *file)
{
    if (!file) return;
    if (file->mapped) mili_os_unmap(file->data, file->size);
    else mili_free(file->ctx, file->data, file->size);
    mili_free(file->ctx, file, sizeof *file);
}

MILI_FN mil_status mili_file_open(mil_context *ctx, const char *path, size_t limit, unsigned flags, mil_file **out)
{
    mili_fd fd;
    uint64_t size = 0;
    mil_status status = MIL_OK;
    *out = NULL;
    if (!path) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "opening a file: the path is NULL");
    mil_file *file = (mil_file *)mili_alloc(ctx, sizeof *file);
    if (!file) return MIL_ERROR_NO_MEMORY;
    memset(file, 0, sizeof *file);
    file->ctx = ctx;
    long code = mili_os_open(path, &fd, &size);
    if (code) { status = mili_fail_os(ctx, path, "open it", code); goto fail; }
    if (limit && size > limit) {
        status = mili_fail(ctx, MIL_ERROR_FORMAT, "%s: %llu bytes, more than the %llu that such a file may have", mili_path_tail(path),
                           (unsigned long long)size, (unsigned long long)limit);
    } else if (size > (uint64_t)SIZE_MAX / 2) {
        status = mili_fail_os(ctx, path, "open it", MILI_OS_TOO_LARGE);
    } else if (size) {
        file->size = (size_t)size;
        if (!(flags & MIL_FILE_READ)) file->data = mili_os_map(fd, file->size);
        file->mapped = file->data != NULL;
        if (!file->mapped) {                               // also when this file system cannot map
            file->data = mili_alloc(ctx, file->size);
            if (!file->data) status = MIL_ERROR_NO_MEMORY;
            else {
                code = mili_os_read(fd, file->data, file->size);
                if (code) status = mili_fail_os(ctx, path, "read it", code);
            }
        }
    }
    mili_os_close_read(fd);
    if (status == MIL_OK) { *out = file; return MIL_OK; }
fail:
    mil_file_free(file);
    return status;
}

MIL_DEF mil_status mil_file_open(mil_context *ctx, const char *path, size_t limit, unsigned flags, mil_file **out)
{
    if (out) *out = NULL;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!out) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_file_open: out is NULL");
    return mili_file_open(ctx, path, limit, flags, out);
}

// ---- writing atomically ----

#define MILI_WRITER_ROOM 16384
#define MILI_WRITER_TRIES 1000                             // temporary names left behind by crashed processes of the same number

struct mil_writer {
    mil_context *ctx;
    mili_fd     fd;
    int         open;                                      // the temporary file is there and open
    mil_status  status;
    size_t      bytes;                                     // of this allocation: the texts below stand behind the struct
    size_t      used;                                      // bytes in buffer
    char       *path, *temporary, *scratch;
    unsigned char buffer[MILI_WRITER_ROOM];
};

// Remembers the failure and removes the temporary file.
MILI_FN mil_status mili_writer_fail(mil_writer *w, const char *doing, long code)
{
    if (w->status == MIL_OK) w->status = mili_fail_os(w->ctx, w->path, doing, code);
    if (w->open) {
        mili_os_close(w->fd);
        mili_os_remove(w->temporary);
        w->open = 0;
    }
    return w->status;
}

MIL_DEF void mil_writer_free(mil_writer *writer)
{
    if (!writer) return;
    if (writer->open) {
        mili_os_close(writer->fd);
        mili_os_remove(writer->temporary);
    }
    mili_free(writer->ctx, writer, writer->bytes);
}

MILI_FN mil_status mili_writer_create(mil_context *ctx, const char *path, mil_writer **out)
{
    *out = NULL;
    if (!path || !*path) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "writing a file: the path is NULL or empty");
    const size_t length = strlen(path), extra = 64;        // ".<process>-<try>.tmp" and the zeros
    const size_t bytes = sizeof(mil_writer) + 3 * (length + extra);
    mil_writer *w = (mil_writer *)mili_alloc(ctx, bytes);
    if (!w) return MIL_ERROR_NO_MEMORY;
    memset(w, 0, sizeof *w);
    w->ctx = ctx;
    w->bytes = bytes;
    w->path = (char *)w + sizeof *w;
    w->temporary = w->path + length + extra;
    w->scratch = w->temporary + length + extra;
    memcpy(w->path, path, length + 1);
    long code = MILI_OS_EXISTS;
    for (int i = 0; i < MILI_WRITER_TRIES && code == MILI_OS_EXISTS; i++) {
        snprintf(w->temporary, length + extra, "%s.%lu-%d.tmp", path, mili_os_process(), i);
        code = mili_os_create(w->temporary, path, &w->fd);
    }
    if (code) {
        const mil_status status = mili_writer_fail(w, "write it", code);
        mil_writer_free(w);
        return status;
    }
    w->open = 1;
    *out = w;
    return MIL_OK;
}

MILI_FN mil_status mili_writer_put(mil_writer *w, const void *data, size_t size)
{
    const unsigned char *at = (const unsigned char *)data;
    if (w->status != MIL_OK) return mili_fail(w->ctx, w->status, "%s: writing it failed before", mili_path_tail(w->path));
    if (!w->open) return mili_fail(w->ctx, MIL_ERROR_STATE, "%s: written after its commit", mili_path_tail(w->path));
    while (size) {
        long code = 0;
        if (w->used == 0 && size >= MILI_WRITER_ROOM) {    // large pieces go past the buffer
            code = mili_os_write(w->fd, at, size);
            if (code) return mili_writer_fail(w, "write it", code);
            return MIL_OK;
        }
        const size_t n = MILI_MIN(size, MILI_WRITER_ROOM - w->used);
        memcpy(w->buffer + w->used, at, n);
        w->used += n;
        at += n;
        size -= n;
        if (w->used == MILI_WRITER_ROOM) {
            code = mili_os_write(w->fd, w->buffer, w->used);
            if (code) return mili_writer_fail(w, "write it", code);
            w->used = 0;
        }
    }
    return MIL_OK;
}

MILI_FN mil_status mili_writer_commit(mil_writer *w)
{
    if (w->status != MIL_OK) return mili_fail(w->ctx, w->status, "%s: writing it failed before", mili_path_tail(w->path));
    if (!w->open) return mili_fail(w->ctx, MIL_ERROR_STATE, "%s: committed twice", mili_path_tail(w->path));
    long code = mili_os_write(w->fd, w->buffer, w->used);
    if (code) return mili_writer_fail(w, "write it", code);
    code = mili_os_sync(w->fd);
    if (code) return mili_writer_fail(w, "flush it to the disk", code);
    w->open = 0;
    code = mili_os_close(w->fd);
    if (!code) {
        code = mili_os_rename(w->temporary, w->path);
        if (!code) {
            code = mili_os_sync_folder(w->path, w->scratch);
            return code ? mili_writer_fail(w, "flush its folder to the disk", code) : MIL_OK;
        }
    }
    mili_os_remove(w->temporary);
    return mili_writer_fail(w, "replace it", code);
}

MIL_DEF mil_status mil_writer_create(mil_context *ctx, const char *path, mil_writer **out)
{
    if (out) *out = NULL;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!out) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_writer_create: out is NULL");
    return mili_writer_create(ctx, path, out);
}

MIL_DEF mil_status mil_writer_put(mil_writer *writer, const void *data, size_t size)
{
    if (!writer) return MIL_ERROR_ARGUMENT;
    mili_enter(writer->ctx);
    if (!data && size) return mili_fail(writer->ctx, MIL_ERROR_ARGUMENT, "mil_writer_put: data is NULL");
    return mili_writer_put(writer, data, size);
}

MIL_DEF mil_status mil_writer_commit(mil_writer *writer)
{
    if (!writer) return MIL_ERROR_ARGUMENT;
    mili_enter(writer->ctx);
    return mili_writer_commit(writer);
}

MILI_FN mil_status mili_file_write(mil_context *ctx, const char *path, const void *data, size_t size)
{
    mil_writer *w;
    mil_status status = mili_writer_create(ctx, path, &w);
    if (status == MIL_OK) status = mili_writer_put(w, data, size);
    if (status == MIL_OK) status = mili_writer_commit(w);
    mil_writer_free(w);
    return status;
}

MIL_DEF mil_status mil_file_write(mil_context *ctx, const char *path, const void *data, size_t size)
{
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!data && size) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_file_write: data is NULL");
    return mili_file_write(ctx, path, data, size);
}
#else
typedef struct mil_file mil_file;
typedef struct mil_writer mil_writer;
#endif // MIL_NO_STDIO

// What a foreign file looks like, for the end of an error sentence.
MILI_FN const char *mili_file_hint(const unsigned char *bytes, size_t size)
{
    if (size >= 4 && memcmp(bytes, "PK\3\4", 4) == 0) return " (a zip: a PyTorch checkpoint or .npz?)";
    if (size >= 6 && memcmp(bytes, "\x93NUMPY", 6) == 0) return " (an NPY file?)";
    if (size >= 8 && memcmp(bytes, "\x89HDF\r\n\x1a\n", 8) == 0) return " (an HDF5 file?)";
    if (size >= 2 && bytes[0] == 0x80 && bytes[1] >= 2 && bytes[1] <= 5) return " (a pickle: an old PyTorch checkpoint?)";
    if (size >= 9 && bytes[8] == '{') return " (a safetensors file?)";
    return "";
}

// ---- where writers put their bytes: a file, memory, or nowhere, which counts them ----
typedef struct mili_sink { mil_writer *writer; unsigned char *memory; size_t size; mil_status status; } mili_sink;

MILI_FN void mili_sink_put(mili_sink *sink, const void *data, size_t size)
{
    if (sink->status != MIL_OK || size == 0) return;
    if (sink->memory) memcpy(sink->memory + sink->size, data, size);
#ifndef MIL_NO_STDIO
    else if (sink->writer) sink->status = mili_writer_put(sink->writer, data, size);
#endif
    sink->size += size;
}

MILI_FN void mili_sink_text(mili_sink *sink, const char *text) { mili_sink_put(sink, text, strlen(text)); }

MILI_FN void mili_sink_number(mili_sink *sink, uint64_t u)
{
    char digits[24];
    snprintf(digits, sizeof digits, "%llu", (unsigned long long)u);
    mili_sink_text(sink, digits);
}

MILI_FN void mili_sink_json(mili_sink *sink, const char *text)
{
    char c[6];
    mili_sink_put(sink, "\"", 1);
    for (; *text; text++) mili_sink_put(sink, c, (size_t)mili_json_escape(*text, c));
    mili_sink_put(sink, "\"", 1);
}

// The tensor's values row-major, packed, little-endian; t has been checked, its size is count * element.
MILI_FN void mili_sink_tensor(mili_sink *sink, const mil_tensor *t)
{
    unsigned char chunk[2048];
    const size_t element = mil_dtype_size(t->dtype);
    const int64_t count = mil_tensor_count(t);
    const unsigned char *base = (const unsigned char *)t->data;
    int64_t index[MIL_MAX_RANK];
    size_t used = 0;
    int packed = 1;
    for (int a = 0; a < t->rank; a++) packed &= t->stride[a] == 0;
    if (count == 0) return;
    if (packed && (!MILI_BIG_ENDIAN || element == 1)) { mili_sink_put(sink, base, (size_t)count * element); return; }
    memset(index, 0, sizeof index);
    for (int64_t i = 0; i < count; i++) {
        const unsigned char *at = base;
        if (packed) at += (size_t)i * element;
        else for (int a = 0; a < t->rank; a++) at += (ptrdiff_t)(index[a] * t->stride[a]);
        memcpy(chunk + used, at, element);
        used += element;
        if (used + element > sizeof chunk || i + 1 == count) {
            if (MILI_BIG_ENDIAN && element > 1) mili_swap_copy(chunk, chunk, used, element);
            mili_sink_put(sink, chunk, used);
            used = 0;
        }
        for (int a = t->rank - 1; a >= 0 && ++index[a] == t->shape[a]; a--) index[a] = 0;
    }
}

// Checks a tensor that is to be written and gives its bytes. `what` starts the sentence.
MILI_FN mil_status mili_check_written(mil_context *ctx, const char *what, const mil_tensor *t, size_t *bytes)
{
    const int64_t count = mil_tensor_count(t);
    if (count < 0 || !mili_mul_size((size_t)count, mil_dtype_size(t->dtype), bytes))
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: no valid dtype, rank or shape, or too large", what);
    if (count > 0 && !t->data) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: data is NULL", what);
    return MIL_OK;
}

// ---- safetensors: reading ----
//   u64 n | n bytes of JSON, one object, then spaces | data, covered exactly by the tensors

#define MILI_TENSORS_MAX_HEADER 100000000                  // the reference reader's limit
#define MILI_TENSORS_META "__metadata__"

typedef struct mili_tensor_entry {
    const char *name, *dtype;
    uint64_t    begin, end;                                // in the data
    mil_tensor  tensor;
} mili_tensor_entry;

struct mil_tensors {
    mil_context *ctx;
    mil_file    *file;                                     // NULL when opened from memory
    unsigned char *swapped;                                // big-endian machines: the data, swapped
    size_t       swapped_size;
    mili_tensor_entry *entries;
    int64_t     *by_name;                                  // entries sorted by name
    mil_meta    *metas;
    char        *text;                                     // all names, keys and values, each ended by 0
    int64_t      count, meta_count;
    size_t       text_size;
};

// Dtypes that exist in files but not here, with their bits, so that a listing can check their sizes.
#define MILI_FOREIGN_DTYPE_LIST(X) \
    X("F8_E4M3", 8) X("F8_E5M2", 8) X("F8_E8M0", 8) X("C64", 64) X("F4", 4) X("F6_E2M3", 6) X("F6_E3M2", 6)

// Bits of one element, 0 for a dtype that nobody knows; *dtype is MIL_DTYPE_COUNT for those not offered here.
MILI_FN int mili_tensors_bits(mili_json name, mil_dtype *dtype)
{
    for (int i = 0; i < (int)MIL_DTYPE_COUNT; i++) {
        *dtype = (mil_dtype)i;
        if (mili_json_equal(name, mil_dtype_name(*dtype))) return (int)mil_dtype_size(*dtype) * 8;
    }
    *dtype = MIL_DTYPE_COUNT;
#define MILI_FOREIGN_BITS(text, bits) if (mili_json_equal(name, text)) return bits;
    MILI_FOREIGN_DTYPE_LIST(MILI_FOREIGN_BITS)
#undef MILI_FOREIGN_BITS
    return 0;
}

MIL_DEF void mil_tensors_free(mil_tensors *file)
{
    if (!file) return;
    mil_context *ctx = file->ctx;
    mili_free(ctx, file->swapped, file->swapped_size);
    mili_free(ctx, file->entries, (size_t)file->count * sizeof *file->entries);
    mili_free(ctx, file->by_name, (size_t)file->count * sizeof *file->by_name);
    mili_free(ctx, file->metas, (size_t)file->meta_count * sizeof *file->metas);
    mili_free(ctx, file->text, file->text_size);
#ifndef MIL_NO_STDIO
    mil_file_free(file->file);
#endif
    mili_free(ctx, file, sizeof *file);
}

MILI_FN int mili_tensors_compare_names(const void *arg, int64_t a, int64_t b)
{
    const mili_tensor_entry *entries = (const mili_tensor_entry *)arg;
    return strcmp(entries[a].name, entries[b].name);
}

MILI_FN int mili_tensors_compare_offsets(const void *arg, int64_t a, int64_t b)
{
    const mili_tensor_entry *x = (const mili_tensor_entry *)arg + a, *y = (const mili_tensor_entry *)arg + b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    if (x->end != y->end) return x->end < y->end ? -1 : 1;
    return a < b ? -1 : a > b;
}

// Appends a string's text to the pool.
MILI_FN const char *mili_tensors_text(mil_tensors *file, size_t *used, mili_json string)
{
    char *at = file->text + *used;
    *used += mili_json_copy(string, at, file->text_size - *used, NULL) + 1;
    return at;
}

// A string that C can hold: 1 and its bytes with the final 0 added to *bytes.
MILI_FN int mili_tensors_measure(mili_json string, size_t *bytes)
{
    int has_nul;
    *bytes += mili_json_copy(string, NULL, 0, &has_nul) + 1;
    return !has_nul;
}

// One member of the header: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}
MILI_FN mil_status mili_tensors_entry(mil_context *ctx, const char *where, mili_json value, const unsigned char *data, size_t data_size,
                                      unsigned flags, mili_tensor_entry *entry)
{
    static const char *const fields[] = { "dtype", "shape", "data_offsets" };
    mili_json found[3], name, field;
    mili_json_iter it = mili_json_begin(value);
    int64_t shape[MIL_MAX_RANK], offsets[2], rank = 0, n = 0;
    mil_dtype dtype;
    uint64_t need = 0;                                     // bits
    const mili_quoted q = mili_quote(entry->name);
    memset(found, 0, sizeof found);
    memset(shape, 0, sizeof shape);
    if (!it.object) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: its entry is not an object", where, q.text);
    while (mili_json_next(&it, &name, &field)) {
        int i = 0;
        while (i < 3 && !mili_json_equal(name, fields[i])) i++;
        if (i == 3)
            return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: field %s is not one of dtype, shape, data_offsets", where, q.text,
                             mili_quote_n(name.text + 1, name.size - 2).text);
        if (found[i].size) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: %s stands twice", where, q.text, fields[i]);
        found[i] = field;
    }
    for (int i = 0; i < 3; i++) {
        if (!found[i].size) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: %s is missing", where, q.text, fields[i]);
    }

    if (mili_json_kind(found[0]) != '"') return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: dtype is not a string", where, q.text);
    const mili_quoted type = mili_quote_n(found[0].text + 1, found[0].size - 2);
    const int bits = mili_tensors_bits(found[0], &dtype);
    if (dtype == MIL_DTYPE_COUNT && !(flags & MIL_FILE_LIST_ONLY))
        return mili_fail(ctx, MIL_ERROR_UNSUPPORTED, "%s: tensor %s: dtype %s is %s", where, q.text, type.text,
                         bits ? "not supported" : "unknown");

    if (mili_json_kind(found[1]) != '[') return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: shape is not an array", where, q.text);
    it = mili_json_begin(found[1]);
    while (mili_json_next(&it, &name, &field)) {
        int64_t length;
        if (!mili_json_int(field, &length) || length < 0)
            return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: shape: %s is not a non-negative integer that fits", where, q.text,
                             mili_quote_n(field.text, field.size).text);
        if (rank < MIL_MAX_RANK) shape[rank] = length;
        rank++;
    }
    if (rank > MIL_MAX_RANK)
        return mili_fail(ctx, MIL_ERROR_UNSUPPORTED, "%s: tensor %s: rank %lld is above the %d supported", where, q.text, (long long)rank,
                         MIL_MAX_RANK);
    const int64_t count = mili_shape_count((int)rank, shape);
    const mili_text words = mili_shape_text((int)rank, shape);
    if (count < 0 || (bits && (uint64_t)count > UINT64_MAX / (uint64_t)bits))
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: shape %s overflows", where, q.text, words.s);
    need = (uint64_t)count * (uint64_t)bits;

    if (!mili_json_ints(found[2], offsets, 2, &n) || n != 2 || offsets[0] < 0 || offsets[1] < 0)
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: data_offsets %s are not two non-negative integers that fit", where, q.text,
                         mili_quote_n(found[2].text, found[2].size).text);
    if (offsets[0] > offsets[1] || (uint64_t)offsets[1] > data_size)
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: data_offsets [%lld, %lld] %s", where, q.text, (long long)offsets[0],
                         (long long)offsets[1], offsets[0] > offsets[1] ? "end before they begin" : "reach past the end of the file");
    entry->begin = (uint64_t)offsets[0];
    entry->end = (uint64_t)offsets[1];
    if (bits && (need % 8 || entry->end - entry->begin != need / 8))
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: data_offsets [%lld, %lld] hold %llu bytes, but %s %s takes %llu", where,
                         q.text, (long long)offsets[0], (long long)offsets[1], (unsigned long long)(entry->end - entry->begin),
                         type.text, words.s, (unsigned long long)(need / 8 + (need % 8 != 0)));
    entry->tensor = mil_tensor_make(dtype == MIL_DTYPE_COUNT ? NULL : data + entry->begin, dtype, (int)rank, shape);
    return MIL_OK;
}

// Tensors must cover the data exactly. `order` is room for one index per tensor.
MILI_FN mil_status mili_tensors_cover(mil_tensors *file, const char *where, int64_t *order, size_t data_size)
{
    uint64_t at = 0;
    for (int64_t i = 0; i < file->count; i++) order[i] = i;
    mili_index_sort(order, file->count, mili_tensors_compare_offsets, file->entries);
    for (int64_t i = 0; i < file->count; i++) {
        const mili_tensor_entry *e = &file->entries[order[i]];
        if (e->begin != at)
            return mili_fail(file->ctx, MIL_ERROR_FORMAT, "%s: tensor %s: data_offsets begin at %llu %s, which ends at %llu: %s", where,
                             mili_quote(e->name).text, (unsigned long long)e->begin, i ? "after a tensor" : "after the header",
                             (unsigned long long)at, e->begin < at ? "they overlap" : "a gap");
        at = e->end;
    }
    if (at != data_size)
        return mili_fail(file->ctx, MIL_ERROR_FORMAT, "%s: %llu bytes after the last tensor belong to none", where,
                         (unsigned long long)(data_size - at));
    return MIL_OK;
}

// Fills `file` from the checked header; names, counts and text are measured first, so that each array is allocated once.
MILI_FN mil_status mili_tensors_fill(mil_tensors *file, const char *where, mili_json header, const unsigned char *data, size_t data_size,
                                     unsigned flags)
{
    mil_context *ctx = file->ctx;
    mili_json key, value, meta = { NULL, 0 };
    mili_json_iter it = mili_json_begin(header);
    int64_t count = 0, meta_count = 0, i;
    size_t used = 0, bytes = 0;
    int c_text = 1;
    mil_status status;
    while (mili_json_next(&it, &key, &value)) {
        if (mili_json_equal(key, MILI_TENSORS_META)) {
            if (meta.size) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: " MILI_TENSORS_META " stands twice", where);
            if (mili_json_kind(value) != '{')
                return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: " MILI_TENSORS_META " is not an object", where);
            meta = value;
            continue;
        }
        const mili_json dtype = mili_json_find(value, "dtype");
        c_text &= mili_tensors_measure(key, &bytes) & mili_tensors_measure(dtype, &bytes);
        if (!c_text)
            return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s: its name or dtype holds \\u0000", where,
                             mili_quote_n(key.text + 1, key.size - 2).text);
        count++;
    }
    it = mili_json_begin(meta);
    while (mili_json_next(&it, &key, &value)) {
        const mili_quoted q = mili_quote_n(key.text + 1, key.size - 2);
        if (mili_json_kind(value) != '"')
            return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: " MILI_TENSORS_META ": the value of %s is not a string", where, q.text);
        c_text &= mili_tensors_measure(key, &bytes) & mili_tensors_measure(value, &bytes);
        if (!c_text) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: " MILI_TENSORS_META ": %s holds \\u0000", where, q.text);
        meta_count++;
    }
    status = mili_json_check_unique(ctx, where, meta);
    if (status != MIL_OK) return status;

    // An entry takes at least 40 bytes of header. Where there are more, one is malformed, and no further than that one is read.
    const int64_t room = MILI_MIN(count, (int64_t)(header.size / 40) + 1);
    file->text = (char *)mili_alloc(ctx, bytes);
    file->text_size = file->text ? bytes : 0;
    if (bytes && !file->text) return MIL_ERROR_NO_MEMORY;
    if (count) {
        file->entries = (mili_tensor_entry *)mili_alloc(ctx, (size_t)room * sizeof *file->entries);
        if (!file->entries) return MIL_ERROR_NO_MEMORY;
        file->count = room;
        file->by_name = (int64_t *)mili_alloc(ctx, (size_t)room * sizeof *file->by_name);
        if (!file->by_name) return MIL_ERROR_NO_MEMORY;
    }
    if (meta_count) {
        file->metas = (mil_meta *)mili_alloc(ctx, (size_t)meta_count * sizeof *file->metas);
        if (!file->metas) return MIL_ERROR_NO_MEMORY;
        file->meta_count = meta_count;
    }

    i = 0;
    it = mili_json_begin(header);
    while (mili_json_next(&it, &key, &value)) {
        if (mili_json_equal(key, MILI_TENSORS_META)) continue;
        MIL_ASSERT(i < room);
        mili_tensor_entry *entry = &file->entries[i++];
        entry->name = mili_tensors_text(file, &used, key);
        entry->dtype = mili_tensors_text(file, &used, mili_json_find(value, "dtype"));
        status = mili_tensors_entry(ctx, where, value, data, data_size, flags, entry);
        if (status != MIL_OK) return status;
    }
    i = 0;
    it = mili_json_begin(meta);
    while (mili_json_next(&it, &key, &value)) {
        file->metas[i].key = mili_tensors_text(file, &used, key);
        file->metas[i++].value = mili_tensors_text(file, &used, value);
    }
    MIL_ASSERT(used == bytes);

    status = mili_tensors_cover(file, where, file->by_name, data_size);
    if (status != MIL_OK) return status;
    for (i = 0; i < count; i++) file->by_name[i] = i;
    mili_index_sort(file->by_name, count, mili_tensors_compare_names, file->entries);
    for (i = 1; i < count; i++) {
        const char *name = file->entries[file->by_name[i]].name;
        if (strcmp(name, file->entries[file->by_name[i - 1]].name) == 0)
            return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: tensor %s stands twice", where, mili_quote(name).text);
    }

    if (MILI_BIG_ENDIAN && data_size) {
        file->swapped = (unsigned char *)mili_alloc(ctx, data_size);
        if (!file->swapped) return MIL_ERROR_NO_MEMORY;
        file->swapped_size = data_size;
        for (i = 0; i < count; i++) {
            mili_tensor_entry *e = &file->entries[i];
            const size_t element = mil_dtype_size(e->tensor.dtype), begin = (size_t)e->begin;
            if (!e->tensor.data) continue;
            mili_swap_copy(file->swapped + begin, data + begin, (size_t)(e->end - e->begin), element);
            e->tensor.data = file->swapped + begin;
        }
    }
    return MIL_OK;
}

// Takes `source` (may be NULL) over, also on failure. `where` starts error sentences.
MILI_FN mil_status mili_tensors_parse(mil_context *ctx, const char *where, const void *bytes, size_t size, unsigned flags,
                                      mil_file *source, mil_tensors **out)
{
    const unsigned char *at = (const unsigned char *)bytes;
    mil_status status = MIL_OK;
    mili_json header;
    char *copy = NULL;
    size_t copy_size = 0;
    uint64_t n = 0;
    *out = NULL;
    mil_tensors *file = (mil_tensors *)mili_alloc(ctx, sizeof *file);
    if (!file) {
#ifndef MIL_NO_STDIO
        mil_file_free(source);
#endif
        return MIL_ERROR_NO_MEMORY;
    }
    memset(file, 0, sizeof *file);
    file->ctx = ctx;
    file->file = source;

    if (size < 8) {
        status = mili_fail(ctx, MIL_ERROR_FORMAT, "%s: %llu bytes, but a safetensors file has at least 8%s", where,
                           (unsigned long long)size, mili_file_hint(at, size));
        goto done;
    }
    n = mili_read_le(at, 8);
    if (n > MILI_TENSORS_MAX_HEADER || n > size - 8) {
        const char *hint = mili_file_hint(at, MILI_MIN(size, 8));
        status = mili_fail(ctx, MIL_ERROR_FORMAT, "%s: the header's length %llu is %s%s", where, (unsigned long long)n,
                           n > MILI_TENSORS_MAX_HEADER ? "above the format's 100000000" : "past the end of the file",
                           *hint ? hint : size < 9 || at[8] != '{' ? " (no safetensors file?)" : "");
        goto done;
    }
    if (n == 0 || at[8] != '{') {
        status = mili_fail(ctx, MIL_ERROR_FORMAT, "%s: the header does not begin with {", where);
        goto done;
    }
#ifndef MIL_NO_STDIO
    // The header of a mapped file may change between two looks at it; it is read twice, so it is copied.
    if (source && source->mapped) {
        copy_size = (size_t)n;
        copy = (char *)mili_alloc(ctx, copy_size);
        if (!copy) { status = MIL_ERROR_NO_MEMORY; goto done; }
        memcpy(copy, at + 8, copy_size);
    }
#endif
    {
        const char *text = copy ? copy : (const char *)at + 8;
        status = mili_json_parse(ctx, where, text, (size_t)n, 3, &header);
        for (size_t i = (size_t)n; status == MIL_OK && i > header.size; i--) {
            if (text[i - 1] != ' ')
                status = mili_fail(ctx, MIL_ERROR_FORMAT, "%s: JSON: byte %llu: only spaces may follow the header's }", where,
                                   (unsigned long long)(i - 1));
        }
    }
    if (status == MIL_OK) status = mili_tensors_fill(file, where, header, at + 8 + n, size - 8 - (size_t)n, flags);
done:
    mili_free(ctx, copy, copy_size);
    if (status == MIL_OK) *out = file;
    else mil_tensors_free(file);
    return status;
}

MILI_FN mil_status mili_tensors_open_memory(mil_context *ctx, const void *bytes, size_t size, unsigned flags, mil_tensors **out)
{
    *out = NULL;
    if (!bytes && size) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "opening safetensors in memory: bytes is NULL");
    return mili_tensors_parse(ctx, "safetensors in memory", bytes, size, flags, NULL, out);
}

MIL_DEF mil_status mil_tensors_open_memory(mil_context *ctx, const void *bytes, size_t size, unsigned flags, mil_tensors **out)
{
    if (out) *out = NULL;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!out) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_tensors_open_memory: out is NULL");
    return mili_tensors_open_memory(ctx, bytes, size, flags, out);
}

#ifndef MIL_NO_STDIO
MILI_FN mil_status mili_tensors_open(mil_context *ctx, const char *path, unsigned flags, mil_tensors **out)
{
    mil_file *source;
    *out = NULL;
    const mil_status status = mili_file_open(ctx, path, 0, flags, &source);
    if (status != MIL_OK) return status;
    return mili_tensors_parse(ctx, mili_path_tail(path), source->data, source->size, flags, source, out);
}

MIL_DEF mil_status mil_tensors_open(mil_context *ctx, const char *path, unsigned flags, mil_tensors **out)
{
    if (out) *out = NULL;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!out) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_tensors_open: out is NULL");
    return mili_tensors_open(ctx, path, flags, out);
}
#endif

MIL_DEF int64_t mil_tensors_count(const mil_tensors *file) { return file ? file->count : 0; }
MIL_DEF int64_t mil_tensors_meta_count(const mil_tensors *file) { return file ? file->meta_count : 0; }

MILI_INLINE const mili_tensor_entry *mili_tensors_pick(const mil_tensors *file, int64_t index)
{
    return file && index >= 0 && index < file->count ? &file->entries[index] : NULL;
}

MIL_DEF const char *mil_tensors_name(const mil_tensors *file, int64_t index)
{
    const mili_tensor_entry *e = mili_tensors_pick(file, index);
    return e ? e->name : NULL;
}

MIL_DEF const mil_tensor *mil_tensors_at(const mil_tensors *file, int64_t index)
{
    const mili_tensor_entry *e = mili_tensors_pick(file, index);
    return e ? &e->tensor : NULL;
}

MIL_DEF size_t mil_tensors_bytes(const mil_tensors *file, int64_t index)
{
    const mili_tensor_entry *e = mili_tensors_pick(file, index);
    return e ? (size_t)(e->end - e->begin) : 0;
}

MIL_DEF const char *mil_tensors_dtype(const mil_tensors *file, int64_t index)
{
    const mili_tensor_entry *e = mili_tensors_pick(file, index);
    return e ? e->dtype : NULL;
}

MIL_DEF int64_t mil_tensors_find(const mil_tensors *file, const char *name)
{
    int64_t low = 0, high = mil_tensors_count(file);
    if (!name) return -1;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        const int order = strcmp(name, file->entries[file->by_name[middle]].name);
        if (order == 0) return file->by_name[middle];
        if (order < 0) high = middle; else low = middle + 1;
    }
    return -1;
}

MIL_DEF const mil_tensor *mil_tensors_get(const mil_tensors *file, const char *name)
{
    return mil_tensors_at(file, mil_tensors_find(file, name));
}

MIL_DEF const char *mil_tensors_meta_key(const mil_tensors *file, int64_t index)
{
    return file && index >= 0 && index < file->meta_count ? file->metas[index].key : NULL;
}

MIL_DEF const char *mil_tensors_meta_value(const mil_tensors *file, int64_t index)
{
    return file && index >= 0 && index < file->meta_count ? file->metas[index].value : NULL;
}

MIL_DEF const char *mil_tensors_meta(const mil_tensors *file, const char *key)
{
    for (int64_t i = 0; key && i < mil_tensors_meta_count(file); i++) {
        if (strcmp(file->metas[i].key, key) == 0) return file->metas[i].value;
    }
    return NULL;
}

// ---- safetensors: writing ----

// The reference's order of dtypes, by growing alignment; the writer goes from the last to the first.
MILI_FN int mili_dtype_order(mil_dtype dtype)
{
    static const mil_dtype order[] = { MIL_BOOL, MIL_U8, MIL_I8, MIL_I16, MIL_U16, MIL_F16, MIL_BF16, MIL_I32, MIL_U32, MIL_F32,
                                       MIL_F64, MIL_I64, MIL_U64 };
    int i = 0;
    while (i < MILI_COUNT(order) && order[i] != dtype) i++;
    return i;
}

typedef struct mili_tensors_plan {
    const mil_tensor *tensors;
    const char *const *names;
    const mil_meta *meta;
    int64_t  count, meta_count;
    int64_t *order, *meta_order;                           // one allocation: count + meta_count indices
    size_t   header_size, data_size;
    int      add_format;                                   // "format" was not given
} mili_tensors_plan;

MILI_FN int mili_plan_compare(const void *arg, int64_t a, int64_t b)
{
    const mili_tensors_plan *plan = (const mili_tensors_plan *)arg;
    const int x = mili_dtype_order(plan->tensors[a].dtype), y = mili_dtype_order(plan->tensors[b].dtype);
    return x != y ? y - x : strcmp(plan->names[a], plan->names[b]);
}

MILI_FN int mili_plan_compare_names(const void *arg, int64_t a, int64_t b)
{
    const mili_tensors_plan *plan = (const mili_tensors_plan *)arg;
    return strcmp(plan->names[a], plan->names[b]);
}

MILI_FN int mili_plan_compare_meta(const void *arg, int64_t a, int64_t b)
{
    const mili_tensors_plan *plan = (const mili_tensors_plan *)arg;
    return strcmp(plan->meta[a].key, plan->meta[b].key);
}

MILI_FN void mili_plan_header(const mili_tensors_plan *plan, mili_sink *sink)
{
    uint64_t at = 0;
    int64_t i = 0;
    int add = plan->add_format, comma = 0;
    mili_sink_text(sink, "{\"" MILI_TENSORS_META "\":{");
    while (add || i < plan->meta_count) {                  // "format" takes its place among the sorted keys
        const mil_meta *m = i < plan->meta_count ? &plan->meta[plan->meta_order[i]] : NULL;
        const int ours = add && (!m || strcmp("format", m->key) < 0);
        if (comma) mili_sink_put(sink, ",", 1);
        comma = 1;
        mili_sink_json(sink, ours ? "format" : m->key);
        mili_sink_put(sink, ":", 1);
        mili_sink_json(sink, ours ? "pt" : m->value);
        if (ours) add = 0; else i++;
    }
    mili_sink_put(sink, "}", 1);
    for (i = 0; i < plan->count; i++) {
        const mil_tensor *t = &plan->tensors[plan->order[i]];
        mili_sink_put(sink, ",", 1);
        mili_sink_json(sink, plan->names[plan->order[i]]);
        mili_sink_text(sink, ":{\"dtype\":\"");
        mili_sink_text(sink, mil_dtype_name(t->dtype));
        mili_sink_text(sink, "\",\"shape\":[");
        for (int a = 0; a < t->rank; a++) {
            if (a) mili_sink_put(sink, ",", 1);
            mili_sink_number(sink, (uint64_t)t->shape[a]);
        }
        mili_sink_text(sink, "],\"data_offsets\":[");
        mili_sink_number(sink, at);
        mili_sink_put(sink, ",", 1);
        at += (uint64_t)mil_tensor_count(t) * mil_dtype_size(t->dtype);
        mili_sink_number(sink, at);
        mili_sink_text(sink, "]}");
    }
    mili_sink_put(sink, "}", 1);
}

MILI_FN size_t mili_plan_index_bytes(const mili_tensors_plan *plan)
{
    return ((size_t)plan->count + (size_t)plan->meta_count) * sizeof(int64_t);
}

// Checks everything, sorts, measures. The plan's index is to be freed by the caller, also on failure.
MILI_FN mil_status mili_plan_make(mil_context *ctx, mili_tensors_plan *plan, const mil_tensor *tensors, const char *const *names,
                                  int64_t count, const mil_meta *meta, int64_t meta_count)
{
    mili_sink measure;
    memset(plan, 0, sizeof *plan);
    if (count < 0 || meta_count < 0 || (count && (!tensors || !names)) || (meta_count && !meta) ||
        count > INT32_MAX || meta_count > INT32_MAX)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "writing safetensors: a negative count, or no tensors, names or metadata given");
    plan->tensors = tensors;
    plan->names = names;
    plan->meta = meta;
    plan->add_format = 1;
    for (int64_t i = 0; i < meta_count; i++) {
        if (!meta[i].key || !meta[i].value || !mili_utf8_valid(meta[i].key, strlen(meta[i].key)) ||
            !mili_utf8_valid(meta[i].value, strlen(meta[i].value)))
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "writing safetensors: metadata %s: NULL or not UTF-8",
                             mili_quote(meta[i].key ? meta[i].key : "").text);
        if (strcmp(meta[i].key, "format") == 0) plan->add_format = 0;
    }
    for (int64_t i = 0; i < count; i++) {
        char what[160];
        size_t bytes = 0;
        if (!names[i] || !mili_utf8_valid(names[i], strlen(names[i])) || strcmp(names[i], MILI_TENSORS_META) == 0)
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "writing safetensors: tensor %s: the name is NULL, not UTF-8 or reserved",
                             mili_quote(names[i] ? names[i] : "").text);
        snprintf(what, sizeof what, "writing safetensors: tensor %s", mili_quote(names[i]).text);
        const mil_status status = mili_check_written(ctx, what, &tensors[i], &bytes);
        if (status != MIL_OK) return status;
        if (!mili_add_size(plan->data_size, bytes, &plan->data_size) || plan->data_size > SIZE_MAX / 4)
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: all tensors together are too large", what);
    }
    if (count + meta_count) {
        plan->count = count;
        plan->meta_count = meta_count;
        plan->order = (int64_t *)mili_alloc(ctx, mili_plan_index_bytes(plan));
        if (!plan->order) return MIL_ERROR_NO_MEMORY;
        plan->meta_order = plan->order + count;
    }
    for (int64_t i = 0; i < count; i++) plan->order[i] = i;
    for (int64_t i = 0; i < meta_count; i++) plan->meta_order[i] = i;
    mili_index_sort(plan->meta_order, meta_count, mili_plan_compare_meta, plan);
    for (int64_t i = 1; i < meta_count; i++) {
        const char *key = meta[plan->meta_order[i]].key;
        if (strcmp(key, meta[plan->meta_order[i - 1]].key) == 0)
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "writing safetensors: metadata %s is given twice", mili_quote(key).text);
    }
    mili_index_sort(plan->order, count, mili_plan_compare_names, plan);
    for (int64_t i = 1; i < count; i++) {
        const char *name = names[plan->order[i]];
        if (strcmp(name, names[plan->order[i - 1]]) == 0)
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "writing safetensors: tensor %s is given twice", mili_quote(name).text);
    }
    mili_index_sort(plan->order, count, mili_plan_compare, plan);
    memset(&measure, 0, sizeof measure);
    mili_plan_header(plan, &measure);
    plan->header_size = (measure.size + 7) / 8 * 8;
    if (plan->header_size > MILI_TENSORS_MAX_HEADER)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "writing safetensors: the header takes %llu bytes, above the format's 100000000",
                         (unsigned long long)plan->header_size);
    return MIL_OK;
}

MILI_FN void mili_plan_write(const mili_tensors_plan *plan, mili_sink *sink)
{
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)plan->header_size >> (8 * i) & 255);
    mili_sink_put(sink, length, sizeof length);
    mili_plan_header(plan, sink);
    while (sink->status == MIL_OK && sink->size < 8 + plan->header_size) mili_sink_put(sink, " ", 1);
    for (int64_t i = 0; i < plan->count; i++) mili_sink_tensor(sink, &plan->tensors[plan->order[i]]);
}

// The two-call protocol: gives the need, and says whether there is memory to write to. Sizes were checked not to wrap.
MILI_FN mil_status mili_memory_room(mil_context *ctx, const char *what, void *dst, size_t *size, size_t need, mili_sink *sink)
{
    const size_t room = *size;
    *size = need;
    memset(sink, 0, sizeof *sink);
    if (dst && room < need)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: %llu bytes of room, %llu are needed", what, (unsigned long long)room,
                         (unsigned long long)need);
    sink->memory = (unsigned char *)dst;
    return MIL_OK;
}

MILI_FN mil_status mili_tensors_write_memory(mil_context *ctx, const mil_tensor *tensors, const char *const *names, int64_t count,
                                             const mil_meta *meta, int64_t meta_count, void *dst, size_t *size)
{
    mili_tensors_plan plan;
    mili_sink sink;
    mil_status status = mili_plan_make(ctx, &plan, tensors, names, count, meta, meta_count);
    if (status == MIL_OK)
        status = mili_memory_room(ctx, "writing safetensors", dst, size, 8 + plan.header_size + plan.data_size, &sink);
    if (status == MIL_OK && dst) mili_plan_write(&plan, &sink);
    mili_free(ctx, plan.order, mili_plan_index_bytes(&plan));
    return status;
}

MIL_DEF mil_status mil_tensors_write_memory(mil_context *ctx, const mil_tensor *tensors, const char *const *names, int64_t count,
                                            const mil_meta *meta, int64_t meta_count, void *dst, size_t *size)
{
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!size) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_tensors_write_memory: size is NULL");
    return mili_tensors_write_memory(ctx, tensors, names, count, meta, meta_count, dst, size);
}

#ifndef MIL_NO_STDIO
MILI_FN mil_status mili_tensors_write(mil_context *ctx, const char *path, const mil_tensor *tensors, const char *const *names,
                                      int64_t count, const mil_meta *meta, int64_t meta_count)
{
    mili_tensors_plan plan;
    mili_sink sink;
    mil_status status = mili_plan_make(ctx, &plan, tensors, names, count, meta, meta_count);
    memset(&sink, 0, sizeof sink);
    if (status == MIL_OK) status = mili_writer_create(ctx, path, &sink.writer);
    if (status == MIL_OK) {
        mili_plan_write(&plan, &sink);
        status = sink.status;
    }
    if (status == MIL_OK) status = mili_writer_commit(sink.writer);
    mil_writer_free(sink.writer);
    mili_free(ctx, plan.order, mili_plan_index_bytes(&plan));
    return status;
}

MIL_DEF mil_status mil_tensors_write(mil_context *ctx, const char *path, const mil_tensor *tensors, const char *const *names,
                                     int64_t count, const mil_meta *meta, int64_t meta_count)
{
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    return mili_tensors_write(ctx, path, tensors, names, count, meta, meta_count);
}
#endif

// ---- NPY: reading ----
//   93 'N' 'U' 'M' 'P' 'Y' | major | minor | header length u16 (1.0) or u32 (2.0, 3.0) | a Python dict, spaces, newline | data

#define MILI_NPY_MAX_HEADER 10000                          // NumPy's own limit

struct mil_npy {
    mil_context *ctx;
    mil_file  *file;                                       // NULL when opened from memory
    void      *swapped;                                    // data of the other byte order, swapped
    size_t     swapped_size;
    mil_tensor tensor;
    char       warning[160];
};

// The header, read in one pass: a mapped file may change, but then only what is read changes, never where.
typedef struct mili_npy_header {
    const char *at, *end;
    mil_dtype   dtype;
    char        order;                                     // of bytes: < > or |
    int         fortran, rank;
    int64_t     shape[MIL_MAX_RANK];
} mili_npy_header;

MIL_DEF void mil_npy_free(mil_npy *npy)
{
    if (!npy) return;
    mili_free(npy->ctx, npy->swapped, npy->swapped_size);
#ifndef MIL_NO_STDIO
    mil_file_free(npy->file);
#endif
    mili_free(npy->ctx, npy, sizeof *npy);
}

MILI_FN void mili_npy_space(mili_npy_header *h)
{
    while (h->at < h->end && mili_json_is_space(*h->at)) h->at++;
}

// Skips space, then takes c if it comes next.
MILI_FN int mili_npy_take(mili_npy_header *h, char c)
{
    mili_npy_space(h);
    if (h->at == h->end || *h->at != c) return 0;
    h->at++;
    return 1;
}

MILI_FN int mili_npy_word(mili_npy_header *h, const char *word)
{
    const size_t n = strlen(word);
    mili_npy_space(h);
    if ((size_t)(h->end - h->at) < n || memcmp(h->at, word, n) != 0) return 0;
    h->at += n;
    return 1;
}

// A Python string without escapes, in either kind of quotes.
MILI_FN int mili_npy_string(mili_npy_header *h, const char **text, size_t *size)
{
    const char quote = mili_npy_take(h, '\'') ? '\'' : mili_npy_take(h, '"') ? '"' : '\0';
    if (!quote) return 0;
    *text = h->at;
    while (h->at < h->end && *h->at != quote && *h->at != '\\' && (unsigned char)*h->at >= 0x20) h->at++;
    if (h->at == h->end || *h->at != quote) return 0;
    *size = (size_t)(h->at++ - *text);
    return 1;
}

// "<f4" and the like. NULL, or why it is refused; *unsupported when the array is valid NPY all the same.
MILI_FN const char *mili_npy_descr(mili_npy_header *h, const char *d, size_t n, int *unsupported)
{
    static const struct { char kind, bytes; mil_dtype dtype; } types[] = {
        { 'f', '4', MIL_F32 }, { 'f', '8', MIL_F64 }, { 'f', '2', MIL_F16 }, { 'i', '1', MIL_I8 },  { 'u', '1', MIL_U8 },
        { 'i', '2', MIL_I16 }, { 'u', '2', MIL_U16 }, { 'i', '4', MIL_I32 }, { 'u', '4', MIL_U32 }, { 'i', '8', MIL_I64 },
        { 'u', '8', MIL_U64 }, { 'b', '1', MIL_BOOL } };
    *unsupported = 0;
    if (n < 2 || (d[0] != '<' && d[0] != '>' && d[0] != '|'))
        return "it does not begin with <, > or |, the byte order";
    h->order = d[0];
    for (int i = 0; i < MILI_COUNT(types); i++) {
        if (n != 3 || d[1] != types[i].kind || d[2] != types[i].bytes) continue;
        h->dtype = types[i].dtype;
        if (d[0] == '|' && d[2] != '1') return "| is for types of one byte";
        return NULL;
    }
    *unsupported = 1;
    switch (d[1]) {
    case 'O': return "an object array, which is a pickle; save it with a numeric dtype";
    case 'V': return n == 3 && d[2] == '2' ? "bfloat16 has no code in NPY; convert to float32 or float16, or use safetensors"
                                           : "raw or structured data; save each field as an array of its own";
    case 'U': case 'S': case 'a': return "text; save numbers";
    case 'c': return "complex; save real and imaginary parts as arrays of their own";
    case 'M': case 'm': return "dates or times; convert to int64 or float64";
    case 'f': case 'i': case 'u': case 'b': return "a width that is not supported; convert to float32";
    default: *unsupported = 0; return "no type that NPY has";
    }
}

// A tuple of lengths: (), (4,), (4, 5), (4L, 5L). NULL, or what is wrong.
MILI_FN const char *mili_npy_shape(mili_npy_header *h, int *unsupported)
{
    int64_t rank = 0;
    int comma = 1;
    if (!mili_npy_take(h, '(')) return "shape is not a tuple";
    while (!mili_npy_take(h, ')')) {
        uint64_t u = 0;
        const char *start;
        if (!comma) return "shape is not a tuple of integers";
        mili_npy_space(h);
        start = h->at;
        if (h->at < h->end && *h->at == '-') return "shape has a negative length";
        for (; h->at < h->end && mili_is_digit(*h->at); h->at++) {
            const uint64_t digit = (uint64_t)(*h->at - '0');
            if (u > ((uint64_t)INT64_MAX - digit) / 10) return "shape has a length that does not fit";
            u = u * 10 + digit;
        }
        if (h->at == start || (*start == '0' && h->at - start > 1)) return "shape has a length that is not an integer";
        if (h->at < h->end && *h->at == 'L') h->at++;      // Python 2
        if (rank < MIL_MAX_RANK) h->shape[rank] = (int64_t)u;
        rank++;
        comma = mili_npy_take(h, ',');
    }
    if (rank == 1 && !comma) return "shape (n) is not a tuple";
    *unsupported = rank > MIL_MAX_RANK;
    if (*unsupported) return "rank above 8 is not supported";
    h->rank = (int)rank;
    return NULL;
}

MILI_FN mil_status mili_npy_parse_header(mil_context *ctx, const char *where, mili_npy_header *h)
{
    static const char *const names[] = { "descr", "fortran_order", "shape" };
    int seen[3] = { 0, 0, 0 }, comma = 1, unsupported = 0;
    const char *text = NULL, *why = NULL;
    size_t size = 0;
    if (!mili_npy_take(h, '{')) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: the NPY header is not a dict", where);
    while (!mili_npy_take(h, '}')) {
        int i = 0;
        if (!comma || !mili_npy_string(h, &text, &size))
            return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: the NPY header is not a dict of descr, fortran_order, shape", where);
        while (i < 3 && (strlen(names[i]) != size || memcmp(names[i], text, size) != 0)) i++;
        if (i == 3) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY header: key %s is not one of descr, fortran_order, shape", where,
                                     mili_quote_n(text, size).text);
        if (seen[i]++) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY header: %s stands twice", where, names[i]);
        if (!mili_npy_take(h, ':')) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY header: no : after %s", where, names[i]);
        mili_npy_space(h);
        if (i == 0) {
            if (h->at < h->end && *h->at == '[')
                return mili_fail(ctx, MIL_ERROR_UNSUPPORTED, "%s: NPY header: descr is a list, a structured array; save each field as "
                                 "an array of its own", where);
            if (!mili_npy_string(h, &text, &size)) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY header: descr is not a string", where);
            why = mili_npy_descr(h, text, size, &unsupported);
            if (why) return mili_fail(ctx, unsupported ? MIL_ERROR_UNSUPPORTED : MIL_ERROR_FORMAT, "%s: NPY header: descr %s: %s", where,
                                      mili_quote_n(text, size).text, why);
        } else if (i == 1) {
            h->fortran = mili_npy_word(h, "True");
            if (!h->fortran && !mili_npy_word(h, "False"))
                return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY header: fortran_order is not True or False", where);
        } else {
            text = h->at;
            why = mili_npy_shape(h, &unsupported);
            if (why) return mili_fail(ctx, unsupported ? MIL_ERROR_UNSUPPORTED : MIL_ERROR_FORMAT, "%s: NPY header: %s: %s", where, why,
                                      mili_quote_n(text, (size_t)MILI_MIN(h->end - text, 40)).text);
        }
        comma = mili_npy_take(h, ',');
    }
    for (int i = 0; i < 3; i++) {
        if (!seen[i]) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY header: %s is missing", where, names[i]);
    }
    mili_npy_space(h);
    if (h->at != h->end) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY header: something follows the dict", where);
    if (h->end[-1] != '\n')                                // a header length that is a byte off would shift all data by a byte
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY header: it does not end with a newline", where);
    return MIL_OK;
}

MILI_FN mil_status mili_npy_fill(mil_npy *npy, const char *where, const unsigned char *at, size_t size)
{
    mil_context *ctx = npy->ctx;
    mili_npy_header h;
    size_t need = 0;
    if (size < 10 || memcmp(at, "\x93NUMPY", 6) != 0)
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: %s%s", where, size < 10 ? "too short for an NPY file" : "not an NPY file: the first six "
                         "bytes are not \\x93NUMPY", size < 10 ? "" : mili_file_hint(at, size));
    const int major = at[6], minor = at[7];
    if (major < 1 || major > 3 || minor != 0)
        return mili_fail(ctx, MIL_ERROR_UNSUPPORTED, "%s: NPY version %d.%d; 1.0, 2.0 and 3.0 exist", where, major, minor);
    const size_t start = major == 1 ? 10 : 12;
    if (size < start) return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: too short for an NPY file", where);
    const size_t length = (size_t)mili_read_le(at + 8, major == 1 ? 2 : 4);
    if (length > MILI_NPY_MAX_HEADER || length > size - start)
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: the NPY header's length %llu is %s", where, (unsigned long long)length,
                         length > MILI_NPY_MAX_HEADER ? "above NumPy's limit of 10000" : "past the end of the file");
    memset(&h, 0, sizeof h);
    h.at = (const char *)at + start;
    h.end = h.at + length;
    const mil_status status = mili_npy_parse_header(ctx, where, &h);
    if (status != MIL_OK) return status;

    const unsigned char *data = at + start + length;
    const size_t room = size - start - length, element = mil_dtype_size(h.dtype);
    const int64_t count = mili_shape_count(h.rank, h.shape);
    const mili_text words = mili_shape_text(h.rank, h.shape);
    if (count < 0 || !mili_mul_size((size_t)count, element, &need))
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: NPY shape %s overflows", where, words.s);
    if (need > room)
        return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: %llu bytes of data, but %s %s takes %llu", where, (unsigned long long)room,
                         mil_dtype_name(h.dtype), words.s, (unsigned long long)need);
    if (room > need)
        snprintf(npy->warning, sizeof npy->warning, "%llu bytes after the array %s %.100s are ignored", (unsigned long long)(room - need),
                 mil_dtype_name(h.dtype), h.rank <= 3 ? words.s : "");

    if (element > 1 && need && h.order == (MILI_BIG_ENDIAN ? '<' : '>')) {
        npy->swapped = mili_alloc(ctx, need);
        if (!npy->swapped) return MIL_ERROR_NO_MEMORY;
        npy->swapped_size = need;
        mili_swap_copy(npy->swapped, data, need, element);
        data = (const unsigned char *)npy->swapped;
    }
    npy->tensor = mil_tensor_make(data, h.dtype, h.rank, h.shape);
    if (h.fortran && h.rank > 1 && count > 0) {            // the first index runs fastest
        int64_t step = (int64_t)element;
        for (int a = 0; a < h.rank; a++) { npy->tensor.stride[a] = step; step *= h.shape[a]; }
    }
    return MIL_OK;
}

// Takes `source` (may be NULL) over, also on failure.
MILI_FN mil_status mili_npy_parse(mil_context *ctx, const char *where, const void *bytes, size_t size, mil_file *source, mil_npy **out)
{
    mil_status status = MIL_ERROR_NO_MEMORY;
    *out = NULL;
    mil_npy *npy = (mil_npy *)mili_alloc(ctx, sizeof *npy);
    if (!npy) {
#ifndef MIL_NO_STDIO
        mil_file_free(source);
#endif
        return status;
    }
    memset(npy, 0, sizeof *npy);
    npy->ctx = ctx;
    npy->file = source;
    status = mili_npy_fill(npy, where, (const unsigned char *)bytes, size);
    if (status == MIL_OK) *out = npy;
    else mil_npy_free(npy);
    return status;
}

MIL_DEF mil_status mil_npy_open_memory(mil_context *ctx, const void *bytes, size_t size, unsigned flags, mil_npy **out)
{
    MILI_UNUSED(flags);
    if (out) *out = NULL;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!out || (!bytes && size)) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_npy_open_memory: bytes or out is NULL");
    return mili_npy_parse(ctx, "NPY in memory", bytes, size, NULL, out);
}

#ifndef MIL_NO_STDIO
MILI_FN mil_status mili_npy_open(mil_context *ctx, const char *path, unsigned flags, mil_npy **out)
{
    mil_file *source;
    *out = NULL;
    const mil_status status = mili_file_open(ctx, path, 0, flags, &source);
    if (status != MIL_OK) return status;
    return mili_npy_parse(ctx, mili_path_tail(path), source->data, source->size, source, out);
}

MIL_DEF mil_status mil_npy_open(mil_context *ctx, const char *path, unsigned flags, mil_npy **out)
{
    if (out) *out = NULL;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!out) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_npy_open: out is NULL");
    return mili_npy_open(ctx, path, flags, out);
}
#endif

MIL_DEF const mil_tensor *mil_npy_tensor(const mil_npy *npy) { return npy ? &npy->tensor : NULL; }
MIL_DEF const char *mil_npy_warning(const mil_npy *npy) { return npy ? npy->warning : ""; }

// ---- NPY: writing ----

// The header with all that stands before the data into head[512]; returns its bytes. NumPy leaves room for the first axis
// to grow to 21 digits, then pads to a multiple of 64.
MILI_FN size_t mili_npy_head(const mil_tensor *t, char *head)
{
    static const char kinds[] = "fiub", first[] = "FIUB";  // F32 is 'f', ...
    const char *name = mil_dtype_name(t->dtype), *kind = strchr(first, name[0]);
    const size_t element = mil_dtype_size(t->dtype);
    size_t n = 10, axis = 0;
    n += (size_t)snprintf(head + n, 512 - n, "{'descr': '%c%c%d', 'fortran_order': False, 'shape': (", element == 1 ? '|' : '<',
                          kinds[kind - first], (int)element);
    for (int a = 0; a < t->rank; a++) {
        const size_t digits = (size_t)snprintf(head + n, 512 - n, a ? ", %lld" : "%lld", (long long)t->shape[a]);
        if (a == 0) axis = digits;
        n += digits;
    }
    n += (size_t)snprintf(head + n, 512 - n, t->rank == 1 ? ",), }" : "), }");
    if (t->rank > 0) for (; axis < 21; axis++) head[n++] = ' ';
    while ((n + 1) % 64) head[n++] = ' ';
    head[n++] = '\n';
    memcpy(head, "\x93NUMPY\1\0", 8);
    head[8] = (char)((n - 10) & 255);
    head[9] = (char)((n - 10) >> 8);
    return n;
}

MILI_FN mil_status mili_npy_check(mil_context *ctx, const mil_tensor *t, size_t *bytes)
{
    const mil_status status = mili_check_written(ctx, "writing NPY", t, bytes);
    if (status != MIL_OK) return status;
    if (t->dtype == MIL_BF16)
        return mili_fail(ctx, MIL_ERROR_UNSUPPORTED, "writing NPY: BF16 has no code in NPY; convert it, or write safetensors");
    return MIL_OK;
}

MIL_DEF mil_status mil_npy_write_memory(mil_context *ctx, const mil_tensor *t, void *dst, size_t *size)
{
    char head[512];
    mili_sink sink;
    size_t bytes = 0, n = 0;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!size) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_npy_write_memory: size is NULL");
    mil_status status = mili_npy_check(ctx, t, &bytes);
    if (status != MIL_OK) return status;
    n = mili_npy_head(t, head);
    status = mili_memory_room(ctx, "writing NPY", dst, size, n + bytes, &sink);
    if (status != MIL_OK || !dst) return status;
    mili_sink_put(&sink, head, n);
    mili_sink_tensor(&sink, t);
    return MIL_OK;
}

#ifndef MIL_NO_STDIO
MIL_DEF mil_status mil_npy_write(mil_context *ctx, const char *path, const mil_tensor *t)
{
    char head[512];
    mili_sink sink;
    size_t bytes = 0;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    mil_status status = mili_npy_check(ctx, t, &bytes);
    if (status != MIL_OK) return status;
    memset(&sink, 0, sizeof sink);
    status = mili_writer_create(ctx, path, &sink.writer);
    if (status != MIL_OK) return status;
    mili_sink_put(&sink, head, mili_npy_head(t, head));
    mili_sink_tensor(&sink, t);
    status = sink.status;
    if (status == MIL_OK) status = mili_writer_commit(sink.writer);
    mil_writer_free(sink.writer);
    return status;
}
#endif

// ==== >>model-code: options, registry, load, save =================================================================

typedef struct mili_alias { const char *key; mil_param *param; } mili_alias;
typedef struct mili_pair { char *key, *value; size_t bytes; } mili_pair;

struct mil_model {
    mil_context *ctx;
    const mil_architecture *arch;
    char        name[192];                                 // four parts
    mili_arena  arena;                                     // params and their keys, config, layers
    void       *config, *layers;
    mil_param **param;
    int64_t     param_count, param_capacity;
    mili_alias *alias;
    int64_t     alias_count, alias_capacity;
    mili_pair  *meta;                                      // the caller's metadata, and what mil_open found
    int64_t     meta_count, meta_capacity;
    char      **class_name;
    int64_t     class_count;
    char      **option_text;                               // of mil_model_option, made when first asked for
    int         averaged;                                  // a trainer's averaged weights are swapped in
};

// ---- option tables ----
// The member that holds an option of each type.
#define MILI_C_INT int64_t
#define MILI_C_REAL double
#define MILI_C_BOOL int
#define MILI_C_CHOICE int
#define MILI_C_INTS mil_int_list
#define MILI_C_TEXTS mil_text_list

// X(name, in_dim)
#define MILI_ENCODERS(X)                                                                            \
    X(conch_v1, 512)                                                                                \
    X(ctranspath, 768) X(conch_v15, 768) X(phikon, 768)                                             \
    X(uni, 1024) X(resnet50, 1024) X(phikon_v2, 1024) X(musk, 1024)                                 \
    X(uni_v2, 1536) X(gigapath, 1536) X(hoptimus, 1536) X(hoptimus1, 1536)                          \
    X(virchow, 2560) X(virchow2, 2560)

typedef struct mili_encoder { const char *name; int64_t dim; } mili_encoder;

MILI_FN const mili_encoder *mili_encoders(int *count)
{
#define MILI_ENCODER_ROW(name, dim) { #name, dim },
    static const mili_encoder table[] = { MILI_ENCODERS(MILI_ENCODER_ROW) };
#undef MILI_ENCODER_ROW
    *count = MILI_COUNT(table);
    return table;
}

MIL_DEF int64_t mil_encoder_dim(const char *encoder)
{
    int count;
    const mili_encoder *table = mili_encoders(&count);
    for (int i = 0; encoder && i < count; i++) if (strcmp(table[i].name, encoder) == 0) return table[i].dim;
    return 0;
}

MIL_DEF int64_t mil_encoder_count(void)
{
    int count;
    mili_encoders(&count);
    return count;
}

MIL_DEF const char *mil_encoder_at(int64_t i)
{
    int count;
    const mili_encoder *table = mili_encoders(&count);
    return i >= 0 && i < count ? table[i].name : NULL;
}

// The nearest of several names, for "did you mean"; start with best NULL.
typedef struct mili_nearest { const char *wanted, *best; int distance; } mili_nearest;

MILI_FN void mili_nearest_try(mili_nearest *n, const char *name)
{
    const int d = mili_distance(n->wanted, name);
    if (n->best && d >= n->distance) return;
    n->best = name;
    n->distance = d;
}

MILI_FN const mil_option *mili_option_find(const mil_option *table, int count, const char *name)
{
    for (int i = 0; i < count; i++) if (strcmp(table[i].name, name) == 0) return &table[i];
    return NULL;
}

// The i-th of "a|b|c"; its length in *size. NULL behind the last.
MILI_FN const char *mili_choice(const char *choices, int i, size_t *size)
{
    while (choices) {
        const char *bar = strchr(choices, '|');
        *size = bar ? (size_t)(bar - choices) : strlen(choices);
        if (i-- == 0) return choices;
        choices = bar ? bar + 1 : NULL;
    }
    return NULL;
}

MILI_FN int mili_text_number(const char *text, double *out)
{
    mili_json v;
    const char *at = text, *end = text + strlen(text);
    v.text = text;
    v.size = strlen(text);
    return v.size > 0 && !mili_json_check_number(&at, end) && at == end && mili_json_double(v, out);
}

MILI_FN int mili_text_int(const char *text, int64_t *out)
{
    mili_json v;
    const char *at = text, *end = text + strlen(text);
    v.text = text;
    v.size = strlen(text);
    return v.size > 0 && !mili_json_check_number(&at, end) && at == end && mili_json_int(v, out);
}

// "min..max" of a number's range, either side may be empty.
MILI_FN int mili_in_range(const char *range, double x)
{
    if (!range) return 1;
    char low[32];
    const char *dots = strstr(range, "..");
    if (!dots || (size_t)(dots - range) >= sizeof low) return 1;
    memcpy(low, range, (size_t)(dots - range));
    low[dots - range] = 0;
    double bound;
    if (mili_text_number(low, &bound) && x < bound) return 0;
    if (mili_text_number(dots + 2, &bound) && x > bound) return 0;
    return 1;
}

// Texts among options are printable ASCII without quotes and backslashes, so that they print as JSON as they are.
MILI_FN int mili_plain_text(const char *text, size_t size)
{
    for (size_t i = 0; i < size; i++) if (text[i] < ' ' || text[i] > '~' || text[i] == '"' || text[i] == '\\') return 0;
    return 1;
}

MILI_FN int mili_is_blank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

// Items of "[a, b]", quotes optional; "null" and "[]" have none. Each is copied to `item`. Returns the count, -1 when malformed or too many.
MILI_FN int mili_list_items(const char *text, char item[][MIL_OPTION_TEXT_SIZE])
{
    if (strcmp(text, "null") == 0 || strcmp(text, "None") == 0) return 0;
    const char *at = text;
    int count = 0;
    if (*at++ != '[') return -1;
    for (;;) {
        while (mili_is_blank(*at)) at++;
        if (*at == ']' && count == 0) break;
        size_t n = 0;
        const char quote = *at == '"' || *at == '\'' ? *at++ : 0;
        if (count == MIL_OPTION_LIST_SIZE) return -1;
        while (*at && (quote ? *at != quote : *at != ',' && *at != ']' && !mili_is_blank(*at))) {
            if (n == MIL_OPTION_TEXT_SIZE - 1) return -1;
            item[count][n++] = *at++;
        }
        if ((quote && *at++ != quote) || (!quote && n == 0) || !mili_plain_text(item[count], n)) return -1;
        item[count++][n] = 0;
        while (mili_is_blank(*at)) at++;
        if (*at == ',') { at++; continue; }
        if (*at != ']') return -1;
        break;
    }
    return at[1] == 0 ? count : -1;
}

// Sets one option from text. 0 when the text is not of its type; then `expected` says what is.
MILI_FN int mili_option_set(const mil_option *o, void *config, const char *text, const char **expected)
{
    char *at = (char *)config + o->offset;
    switch (o->type) {
    case MIL_OPTION_INT: {
        int64_t v;
        *expected = "a whole number";
        if (!mili_text_int(text, &v)) return 0;
        if (!mili_in_range(o->choices, (double)v)) return 0;
        memcpy(at, &v, sizeof v);
        return 1;
    }
    case MIL_OPTION_REAL: {
        double v;
        *expected = "a number";
        if (!mili_text_number(text, &v)) return 0;
        if (!mili_in_range(o->choices, v)) return 0;
        memcpy(at, &v, sizeof v);
        return 1;
    }
    case MIL_OPTION_BOOL: {
        const int yes = strcmp(text, "true") == 0 || strcmp(text, "True") == 0 || strcmp(text, "1") == 0;
        const int no = strcmp(text, "false") == 0 || strcmp(text, "False") == 0 || strcmp(text, "0") == 0;
        *expected = "true or false";
        if (!yes && !no) return 0;
        memcpy(at, &yes, sizeof yes);
        return 1;
    }
    case MIL_OPTION_CHOICE: {
        size_t size;
        *expected = o->choices;
        for (int i = 0; ; i++) {
            const char *choice = mili_choice(o->choices, i, &size);
            if (!choice) return 0;
            if (strlen(text) != size || memcmp(choice, text, size) != 0) continue;
            memcpy(at, &i, sizeof i);
            return 1;
        }
    }
    case MIL_OPTION_TEXT:
        *expected = "a short text of plain ASCII";
        if (strlen(text) >= MIL_OPTION_TEXT_SIZE || !mili_plain_text(text, strlen(text))) return 0;
        memcpy(at, text, strlen(text) + 1);
        return 1;
    case MIL_OPTION_INTS:
    case MIL_OPTION_TEXTS: {
        char item[MIL_OPTION_LIST_SIZE][MIL_OPTION_TEXT_SIZE];
        memset(item, 0, sizeof item);
        const int count = mili_list_items(text, item);
        *expected = o->type == MIL_OPTION_INTS ? "a list of whole numbers, [1,2], or null" : "a list of words, [a,b], or null";
        if (count < 0) return 0;
        if (o->type == MIL_OPTION_TEXTS) {
            mil_text_list *list = (mil_text_list *)(void *)at;
            list->count = count;
            memcpy(list->value, item, sizeof item);
            return 1;
        }
        mil_int_list *list = (mil_int_list *)(void *)at;
        for (int i = 0; i < count; i++) if (!mili_text_int(item[i], &list->value[i]) || !mili_in_range(o->choices, (double)list->value[i])) return 0;
        list->count = count;
        return 1;
    }
    }
    return 0;
}

// One option by name. `what` begins the error sentence.
MILI_FN mil_status mili_option_apply(mil_context *ctx, const mil_option *table, int count, const char *key, const char *value, void *config, const char *what)
{
    const mil_option *o = mili_option_find(table, count, key);
    if (!o) {
        mili_nearest nearest = { key, NULL, 0 };
        for (int i = 0; i < count; i++) mili_nearest_try(&nearest, table[i].name);
        return mili_fail(ctx, MIL_ERROR_UNKNOWN, "%s: no option %s; did you mean \"%s\"?", what, mili_quote_n(key, strlen(key)).text, nearest.best ? nearest.best : "");
    }
    const char *expected = "";
    if (mili_option_set(o, config, value, &expected)) return MIL_OK;
    return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: option %s=%s: expected %s%s%s%s", what, key, mili_quote_n(value, strlen(value)).text, expected,
                     o->choices && strstr(o->choices, "..") ? " (" : "", o->choices && strstr(o->choices, "..") ? o->choices : "",
                     o->choices && strstr(o->choices, "..") ? ")" : "");
}

MILI_FN mil_status mili_option_defaults(mil_context *ctx, const mil_option *table, int count, void *config, const char *what)
{
    for (int i = 0; i < count; i++)
        if (mili_option_apply(ctx, table, count, table[i].name, table[i].value, config, what) != MIL_OK) return ctx->status;
    return MIL_OK;
}

enum { MILI_OPTION_VALUE_SIZE = 640 };                     // holds a full list of the longest texts, printed

// A JSON object of options. Keys listed in `ignored` (separated by blanks) are passed over.
MILI_FN mil_status mili_parse_options_json(mil_context *ctx, const mil_option *table, int count, mili_json object, void *config, const char *what, const char *ignored)
{
    mili_json key, value;
    if (mili_json_kind(object) != '{') return mili_fail(ctx, MIL_ERROR_FORMAT, "%s: the options are not an object", what);
    if (mili_json_check_unique(ctx, what, object) != MIL_OK) return ctx->status;
    mili_json_iter it = mili_json_begin(object);
    while (mili_json_next(&it, &key, &value)) {
        char name[64], text[MILI_OPTION_VALUE_SIZE];
        int nul = 0;
        const size_t n = mili_json_copy(key, name, sizeof name, &nul);
        if (n >= sizeof name || nul) return mili_fail(ctx, MIL_ERROR_UNKNOWN, "%s: no option %s", what, mili_quote_n(key.text, key.size).text);
        if (ignored) {
            const char *at = n && !strchr(name, ' ') ? strstr(ignored, name) : NULL;           // a whole word of the list
            while (at && !((at == ignored || at[-1] == ' ') && (at[n] == ' ' || at[n] == 0))) at = strstr(at + 1, name);
            if (at) continue;
        }
        size_t size = value.size;
        if (mili_json_kind(value) == '"') size = mili_json_copy(value, text, sizeof text, &nul);
        else if (size < sizeof text) { memcpy(text, value.text, size); text[size] = 0; }
        if (size >= sizeof text || nul) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: option %s: the value is too long", what, name);
        if (mili_option_apply(ctx, table, count, name, text, config, what) != MIL_OK) return ctx->status;
    }
    return MIL_OK;
}

// "key=value key=value", separated by blanks or commas; or a JSON object. A value in [] may hold blanks and commas.
MILI_FN mil_status mili_parse_options(mil_context *ctx, const mil_option *table, int count, const char *options, void *config, const char *what)
{
    if (!options) return MIL_OK;
    const char *at = options;
    while (*at == ' ' || *at == '\t' || *at == '\n') at++;
    if (*at == '{') {
        mili_json object;
        if (mili_json_parse(ctx, what, at, strlen(at), 3, &object) != MIL_OK) return ctx->status;
        return mili_parse_options_json(ctx, table, count, object, config, what, NULL);
    }
    for (;;) {
        char key[64], value[MILI_OPTION_VALUE_SIZE];
        size_t n = 0;
        while (*at == ' ' || *at == ',' || *at == '\t' || *at == '\n') at++;
        if (!*at) return MIL_OK;
        const char *start = at;
        while (*at && *at != '=' && *at != ' ' && *at != ',') at++;
        if (*at != '=' || at == start || (size_t)(at - start) >= sizeof key) {
            const char *next = at;
            while (*next == ' ') next++;
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: %s is not key=value%s", what, mili_quote_n(start, (size_t)(at - start)).text,
                             at != start && *next == '=' ? "; there may be no blanks around the =" : "");
        }
        memcpy(key, start, (size_t)(at - start));
        key[at - start] = 0;
        at++;
        for (int depth = 0; *at && (depth || (*at != ' ' && *at != ',' && *at != '\t' && *at != '\n')); at++) {
            depth += (*at == '[') - (*at == ']');
            if (n >= sizeof value - 1) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: option %s: the value is too long", what, key);
            value[n++] = *at;
        }
        value[n] = 0;
        if (mili_option_apply(ctx, table, count, key, value, config, what) != MIL_OK) return ctx->status;
    }
}

// The value as text that mili_option_set reads back to the same bits. `json`: texts are quoted and escaped. Returns the length.
MILI_FN size_t mili_option_print(const mil_option *o, const void *config, char *dst, size_t room, int json)
{
    const char *at = (const char *)config + o->offset;
    size_t size = 0;
    switch (o->type) {
    case MIL_OPTION_INT: {
        int64_t v;
        memcpy(&v, at, sizeof v);
        return (size_t)snprintf(dst, room, "%lld", (long long)v);
    }
    case MIL_OPTION_REAL: {
        double v;
        char text[32];
        memcpy(&v, at, sizeof v);
        mili_json_number(text, v);
        return (size_t)snprintf(dst, room, "%s", text);
    }
    case MIL_OPTION_BOOL: {
        int v;
        memcpy(&v, at, sizeof v);
        return (size_t)snprintf(dst, room, "%s", v ? "true" : "false");
    }
    case MIL_OPTION_CHOICE: {
        int v;
        memcpy(&v, at, sizeof v);
        const char *choice = mili_choice(o->choices, v, &size);
        return (size_t)snprintf(dst, room, json ? "\"%.*s\"" : "%.*s", choice ? (int)size : 0, choice ? choice : "");
    }
    case MIL_OPTION_TEXT:
        return json ? mili_json_string(dst, room, at) : (size_t)snprintf(dst, room, "%s", at);
    case MIL_OPTION_INTS: {
        const mil_int_list *list = (const mil_int_list *)(const void *)at;
        if (list->count == 0) return (size_t)snprintf(dst, room, "null");
        for (int i = 0; i < list->count; i++)
            size += (size_t)snprintf(size < room ? dst + size : NULL, size < room ? room - size : 0, i ? ",%lld" : "[%lld", (long long)list->value[i]);
        return size + (size_t)snprintf(size < room ? dst + size : NULL, size < room ? room - size : 0, "]");
    }
    case MIL_OPTION_TEXTS: {
        const mil_text_list *list = (const mil_text_list *)(const void *)at;
        if (list->count == 0) return (size_t)snprintf(dst, room, "null");
        for (int i = 0; i < list->count; i++)
            size += (size_t)snprintf(size < room ? dst + size : NULL, size < room ? room - size : 0, i ? ",\"%s\"" : "[\"%s\"", list->value[i]);
        return size + (size_t)snprintf(size < room ? dst + size : NULL, size < room ? room - size : 0, "]");
    }
    }
    return 0;
}

// ---- declaring ----
MIL_DEF void mil_declare_fail(mil_builder *b, mil_status status, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (b->status == MIL_OK) b->status = status;
    mili_fail(b->model->ctx, status, "%s: %s", b->model->name, text);
}

MIL_DEF void mil_declare_push(mil_builder *b, const char *scope, ...)
{
    const size_t at = strlen(b->scope), room = sizeof b->scope - at;
    va_list args;
    va_start(args, scope);
    const int n = vsnprintf(b->scope + at, room, scope, args);
    va_end(args);
    if (n < 0 || (size_t)n + 2 > room || b->depth == MILI_MAX_SCOPES) {        // a cut key would be another key
        b->scope[at] = 0;
        mil_declare_fail(b, MIL_ERROR_ARGUMENT, "scope %s is too long or too deep", b->scope);
    } else memcpy(b->scope + at + n, ".", 2);
    if (b->depth < MILI_MAX_SCOPES) b->start[b->depth] = at;
    b->depth++;
}

MIL_DEF void mil_declare_pop(mil_builder *b)
{
    if (b->depth == 0) return;
    b->depth--;
    if (b->depth < MILI_MAX_SCOPES) b->scope[b->start[b->depth]] = 0;
}

MILI_FN mil_param *mili_declare_list(mil_builder *b, mil_dtype dtype, int trainable, mil_init init, int rank, const int64_t *shape, const char *key, va_list args)
{
    mil_model *model = b->model;
    mil_context *ctx = model->ctx;
    char name[256];
    const size_t at = (size_t)snprintf(name, sizeof name, "%s", b->scope);
    const int length = vsnprintf(name + at, sizeof name - at, key, args);
    if (b->status == MIL_OK && (length < 0 || at + (size_t)length >= sizeof name)) mil_declare_fail(b, MIL_ERROR_ARGUMENT, "parameter key %s... is too long", name);
    if (b->status != MIL_OK) return NULL;
    if (rank < 0 || rank > MIL_MAX_RANK) {
        mil_declare_fail(b, MIL_ERROR_ARGUMENT, "parameter %s would have %d axes, 0 to %d are possible", name, rank, MIL_MAX_RANK);
        return NULL;
    }
    const int64_t count = mili_shape_count(rank, shape);
    if (count < 1) {
        mil_declare_fail(b, MIL_ERROR_ARGUMENT, "parameter %s would have the shape %s, empty or beyond any memory", name, mili_shape_text(rank, shape).s);
        return NULL;
    }
    b->declared += count;                                  // no sum of shapes that were accepted comes near 2^63
    if (b->limit && b->declared > b->limit) {
        mil_declare_fail(b, MIL_ERROR_FORMAT, "the options ask for %lld numbers or more, the file's tensors justify %lld", (long long)b->declared, (long long)b->limit);
        return NULL;
    }
    mil_param *p = (mil_param *)mili_arena_alloc(ctx, &model->arena, sizeof *p);
    char *copy = mili_arena_text(ctx, &model->arena, name);
    const size_t bytes = (size_t)count * mil_dtype_size(dtype);
    if (!p || !copy || !mili_reserve(ctx, (void **)&model->param, &model->param_capacity, model->param_count + 1, sizeof *model->param)) {
        b->status = ctx->status;
        return NULL;
    }
    p->key = copy;
    p->dtype = dtype;
    p->rank = rank;
    for (int a = 0; a < rank; a++) p->shape[a] = shape[a];
    p->count = count;
    p->trainable = trainable;
    p->init = init;
    p->model = model;
    p->data = mili_backend_alloc(ctx, bytes);
    if (!p->data) { b->status = ctx->status; return NULL; }
    model->param[model->param_count++] = p;
    return p;
}

MIL_DEF mil_param *mil_declare(mil_builder *b, mil_init init, int rank, const int64_t *shape, const char *key, ...)
{
    va_list args;
    va_start(args, key);
    mil_param *p = mili_declare_list(b, MIL_REAL_DTYPE, 1, init, rank, shape, key, args);
    va_end(args);
    return p;
}

MIL_DEF mil_param *mil_declare_buffer(mil_builder *b, mil_dtype dtype, mil_init init, int rank, const int64_t *shape, const char *key, ...)
{
    va_list args;
    va_start(args, key);
    mil_param *p = mili_declare_list(b, dtype, 0, init, rank, shape, key, args);
    va_end(args);
    return p;
}

MIL_DEF void mil_declare_alias(mil_builder *b, mil_param *param, const char *key, ...)
{
    mil_model *model = b->model;
    char name[256];
    const size_t at = (size_t)snprintf(name, sizeof name, "%s", b->scope);
    va_list args;
    va_start(args, key);
    vsnprintf(name + at, sizeof name - at, key, args);
    va_end(args);
    if (!param || b->status != MIL_OK) return;
    char *copy = mili_arena_text(model->ctx, &model->arena, name);
    if (!copy || !mili_reserve(model->ctx, (void **)&model->alias, &model->alias_capacity, model->alias_count + 1, sizeof *model->alias)) {
        b->status = model->ctx->status;
        return;
    }
    model->alias[model->alias_count].key = copy;
    model->alias[model->alias_count++].param = param;
}

// ---- creating ----
MIL_DEF void mil_model_free(mil_model *model)
{
    if (!model) return;
    mil_context *ctx = model->ctx;
    for (int64_t i = 0; i < model->param_count; i++) {
        mil_param *p = model->param[i];
        mili_backend_release(ctx, p->data, (size_t)p->count * mil_dtype_size(p->dtype));
        mili_backend_release(ctx, p->grad, (size_t)p->count * sizeof(mil_real));
        mili_backend_release(ctx, p->packed, p->packed_bytes);
    }
    for (int64_t i = 0; i < model->meta_count; i++) mili_free(ctx, model->meta[i].key, model->meta[i].bytes);
    for (int64_t i = 0; i < model->class_count; i++) mili_free(ctx, model->class_name[i], strlen(model->class_name[i]) + 1);
    mili_free(ctx, (void *)model->class_name, (size_t)model->class_count * sizeof *model->class_name);
    mili_free(ctx, model->meta, (size_t)model->meta_capacity * sizeof *model->meta);
    mili_free(ctx, model->alias, (size_t)model->alias_capacity * sizeof *model->alias);
    mili_free(ctx, (void *)model->param, (size_t)model->param_capacity * sizeof *model->param);
    mili_arena_free(ctx, &model->arena);
    mili_free(ctx, model, sizeof *model);
}

// Fills a parameter's host copy by its rule. Element e of a parameter is number e of the stream of its key.
MILI_FN void mili_init_values(const mil_param *p, void *dst, uint64_t seed)
{
    const uint64_t stream = mili_hash_text(p->key);
    for (int64_t e = 0; e < p->count; e++) {
        double v = p->init.a;
        if (p->init.kind == MIL_INIT_UNIFORM) v = p->init.a * (2 * mili_random_unit(seed, stream, (uint64_t)e) - 1);
        else if (p->init.kind == MIL_INIT_NORMAL) v = p->init.a * mili_random_gauss(seed, stream, (uint64_t)e);
        else if (p->init.kind == MIL_INIT_RANGE) v = p->init.a + (double)e;
        if (p->dtype == MIL_I64) ((int64_t *)dst)[e] = (int64_t)v;
        else ((mil_real *)dst)[e] = (mil_real)v;
    }
}

MILI_FN mil_status mili_param_fill(mil_param *p, uint64_t seed)
{
    mil_context *ctx = p->model->ctx;
    const size_t bytes = (size_t)p->count * mil_dtype_size(p->dtype);
    p->version++;
    if (mili_host_memory(ctx)) { mili_init_values(p, p->data, seed); return MIL_OK; }
    void *copy = mili_alloc(ctx, bytes);
    if (!copy) return ctx->status;
    mili_init_values(p, copy, seed);
    mili_upload(ctx, p->data, copy, bytes);
    mili_free(ctx, copy, bytes);
    return ctx->status;
}

// While a trainer's averaged weights are swapped in, what is written would be dropped when they are swapped back.
MILI_FN mil_status mili_not_averaged(const mil_model *model, const char *where)
{
    if (!model->averaged) return MIL_OK;
    return mili_fail(model->ctx, MIL_ERROR_STATE, "%s: the averaged weights of a trainer are swapped into %s; swap them back first", where, model->name);
}

MIL_DEF mil_status mil_model_init(mil_model *model, uint64_t seed)
{
    if (!model) return MIL_ERROR_ARGUMENT;
    mili_enter(model->ctx);
    if (mili_not_averaged(model, "mil_model_init") != MIL_OK) return model->ctx->status;
    for (int64_t i = 0; i < model->param_count; i++) if (mili_param_fill(model->param[i], seed) != MIL_OK) break;
    return model->ctx->status;
}

MILI_FN const mil_architecture *mili_architecture_nth(const mil_context *ctx, int64_t i)
{
    return i < ctx->registered_count ? ctx->registered[i] : mil_architecture_at(i - ctx->registered_count);
}

MILI_FN const mil_config *mili_config_find(const mil_architecture *arch, const char *name)
{
    for (int i = 0; i < arch->config_count; i++) if (strcmp(arch->configs[i].name, name) == 0) return &arch->configs[i];
    return NULL;
}

MIL_DEF mil_status mil_register(mil_context *ctx, const mil_architecture *architecture)
{
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mili_enter(ctx);
    if (!architecture || !architecture->name || !architecture->declare || !architecture->forward || architecture->config_count < 1 || !architecture->configs)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_register: an architecture needs a name, a config, declare and forward");
    const mil_option *in_dim = mili_option_find(architecture->options, architecture->option_count, "in_dim");
    if (!in_dim || in_dim->type != MIL_OPTION_INT)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_register: %s has no option in_dim of type MIL_OPTION_INT, the width of its features", architecture->name);
    for (int64_t i = 0; mili_architecture_nth(ctx, i); i++)
        for (int c = 0; c < architecture->config_count && strcmp(mili_architecture_nth(ctx, i)->name, architecture->name) == 0; c++)
            if (mili_config_find(mili_architecture_nth(ctx, i), architecture->configs[c].name))
                return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_register: there is a model %s.%s already", architecture->name, architecture->configs[c].name);
    const size_t old = (size_t)ctx->registered_count * sizeof *ctx->registered;
    const mil_architecture **grown = (const mil_architecture **)mili_realloc(ctx, (void *)ctx->registered, old, old + sizeof *grown);
    if (!grown) return MIL_ERROR_NO_MEMORY;
    ctx->registered = grown;
    ctx->registered[ctx->registered_count++] = architecture;
    return MIL_OK;
}

typedef struct mili_name { char part[4][48]; } mili_name;  // model, config, encoder, task

// Splits a name and fills the missing parts from the left.
MILI_FN mil_status mili_split_name(mil_context *ctx, const char *name, mili_name *out)
{
    static const char *const filled[4] = { "", "base", "uni", "none" };
    for (int i = 0; i < 4; i++) snprintf(out->part[i], sizeof out->part[i], "%s", filled[i]);
    const char *at = name;
    for (int i = 0; ; i++) {
        const char *dot = strchr(at, '.');
        const size_t n = dot ? (size_t)(dot - at) : strlen(at);
        if (i == 4 || n == 0 || n >= sizeof out->part[0])
            return mili_fail(ctx, MIL_ERROR_UNKNOWN, "model name %s: expected model.config.encoder.task, at most four parts, none empty", mili_quote_n(name, strlen(name)).text);
        memcpy(out->part[i], at, n);
        out->part[i][n] = 0;
        if (!dot) return MIL_OK;
        at = dot + 1;
    }
}

// The registry row of a model and config; errors name the nearest.
MILI_FN const mil_architecture *mili_find_architecture(mil_context *ctx, const mili_name *name, const mil_config **config)
{
    mili_nearest models = { name->part[0], NULL, 0 }, configs = { name->part[1], NULL, 0 };
    int known = 0;
    for (int64_t i = 0; mili_architecture_nth(ctx, i); i++) {
        const mil_architecture *arch = mili_architecture_nth(ctx, i);
        mili_nearest_try(&models, arch->name);
        if (strcmp(arch->name, name->part[0]) != 0) continue;
        known = 1;
        *config = mili_config_find(arch, name->part[1]);
        if (*config) return arch;
        for (int c = 0; c < arch->config_count; c++) mili_nearest_try(&configs, arch->configs[c].name);
    }
    if (known) mili_fail(ctx, MIL_ERROR_UNKNOWN, "model %s has no config %s; did you mean \"%s\"?", name->part[0], mili_quote_n(name->part[1], strlen(name->part[1])).text, configs.best);
    else mili_fail(ctx, MIL_ERROR_UNKNOWN, "no model %s; did you mean \"%s\"? One of your own needs mil_register first", mili_quote_n(name->part[0], strlen(name->part[0])).text, models.best ? models.best : "");
    return NULL;
}

// A model with its parameters declared; options come as text, as a JSON object, or both.
// limit: the most elements that all parameters may have, 0: any.
MILI_FN mil_model *mili_model_new(mil_context *ctx, const char *name, const char *options, const mili_json *object, const char *ignored, int64_t limit)
{
    mili_name parts;
    const mil_config *config = NULL;
    if (mili_split_name(ctx, name, &parts) != MIL_OK) return NULL;
    const mil_architecture *arch = mili_find_architecture(ctx, &parts, &config);
    if (!arch) return NULL;
    const int64_t in_dim = mil_encoder_dim(parts.part[2]);
    if (!in_dim) {
        int count;
        const mili_encoder *table = mili_encoders(&count);
        mili_nearest nearest = { parts.part[2], NULL, 0 };
        for (int i = 0; i < count; i++) mili_nearest_try(&nearest, table[i].name);
        mili_fail(ctx, MIL_ERROR_UNKNOWN, "no encoder %s; did you mean \"%s\"?", mili_quote_n(parts.part[2], strlen(parts.part[2])).text, nearest.best);
        return NULL;
    }

    mil_model *model = (mil_model *)mili_alloc_zero(ctx, sizeof *model);
    if (!model) return NULL;
    model->ctx = ctx;
    model->arch = arch;
    snprintf(model->name, sizeof model->name, "%s.%s.%s.%s", parts.part[0], parts.part[1], parts.part[2], parts.part[3]);
    model->config = mili_arena_alloc(ctx, &model->arena, MILI_MAX(arch->config_size, 1));
    model->layers = mili_arena_alloc(ctx, &model->arena, MILI_MAX(arch->model_size, 1));

    mil_builder b;
    memset(&b, 0, sizeof b);
    b.model = model;
    b.limit = limit;
    char dim[32];
    snprintf(dim, sizeof dim, "%lld", (long long)in_dim);
    const mil_option *table = arch->options;
    const int count = arch->option_count;
    if (model->config && model->layers && mili_option_defaults(ctx, table, count, model->config, name) == MIL_OK &&
        mili_parse_options(ctx, table, count, config->options, model->config, name) == MIL_OK &&
        (!mili_option_find(table, count, "in_dim") || mili_option_apply(ctx, table, count, "in_dim", dim, model->config, name) == MIL_OK) &&
        (!object || mili_parse_options_json(ctx, table, count, *object, model->config, name, ignored) == MIL_OK) &&
        mili_parse_options(ctx, table, count, options, model->config, name) == MIL_OK) {
        arch->declare(&b, model->layers, model->config);
        if (b.status == MIL_OK && ctx->status == MIL_OK) {
            mil_status status = MIL_OK;
            for (int64_t i = 0; i < model->param_count && status == MIL_OK; i++) status = mili_param_fill(model->param[i], 0);
        }
    }
    if (ctx->status != MIL_OK) {
        mil_model_free(model);
        return NULL;
    }
    return model;
}

MIL_DEF mil_model *mil_create(mil_context *ctx, const char *name, const char *options)
{
    if (!ctx) return NULL;
    mili_enter(ctx);
    if (!name) { mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_create: name is NULL"); return NULL; }
    return mili_model_new(ctx, name, options, NULL, NULL, 0);
}

// ---- asking a model ----
MIL_DEF mil_context *mil_model_context(const mil_model *model) { return model ? model->ctx : NULL; }
MIL_DEF const char *mil_model_name(const mil_model *model) { return model ? model->name : ""; }
MIL_DEF const mil_architecture *mil_model_architecture(const mil_model *model) { return model ? model->arch : NULL; }
MIL_DEF int64_t mil_model_param_count(const mil_model *model) { return model ? model->param_count : 0; }
MIL_DEF mil_param *mil_model_param(const mil_model *model, int64_t i) { return model && i >= 0 && i < model->param_count ? model->param[i] : NULL; }
MIL_DEF void mil_param_freeze(mil_param *param, int on) { if (param) param->frozen = on != 0; }

MILI_FN int64_t mili_model_int(const mil_model *model, const char *key, int64_t otherwise)
{
    const mil_option *o = mili_option_find(model->arch->options, model->arch->option_count, key);
    if (!o || o->type != MIL_OPTION_INT) return otherwise;
    int64_t v;
    memcpy(&v, (const char *)model->config + o->offset, sizeof v);
    return v;
}

MIL_DEF int64_t mil_model_in_dim(const mil_model *model) { return model ? mili_model_int(model, "in_dim", 0) : 0; }
MIL_DEF int64_t mil_model_num_classes(const mil_model *model) { return model ? mili_model_int(model, "num_classes", 1) : 0; }

MIL_DEF int64_t mil_model_parameter_count(const mil_model *model)
{
    int64_t count = 0;
    for (int64_t i = 0; model && i < model->param_count; i++) if (model->param[i]->trainable) count += model->param[i]->count;
    return count;
}

MIL_DEF const char *mil_model_option(const mil_model *model, const char *key)
{
    if (!model || !key) return NULL;
    const mil_architecture *arch = model->arch;
    const mil_option *o = mili_option_find(arch->options, arch->option_count, key);
    if (!o) return NULL;
    char text[MILI_OPTION_VALUE_SIZE];
    mili_option_print(o, model->config, text, sizeof text, 0);
    union { const mil_model *c; mil_model *m; } u;         // the texts are a cache inside the model's arena
    u.c = model;
    if (!u.m->option_text) u.m->option_text = (char **)mili_arena_alloc(model->ctx, &u.m->arena, (size_t)arch->option_count * sizeof(char *));
    if (!u.m->option_text) return NULL;
    char **slot = &u.m->option_text[o - arch->options];
    if (!*slot) *slot = mili_arena_text(model->ctx, &u.m->arena, text);
    return *slot;
}

MIL_DEF size_t mil_model_config(const mil_model *model, char *dst, size_t size)
{
    size_t at = 0;
    if (!model) return 0;
#define MILI_ROOM (at < size ? dst + at : NULL), (at < size ? size - at : 0)
    at += (size_t)snprintf(MILI_ROOM, "{");
    for (int i = 0; i < model->arch->option_count; i++) {
        const mil_option *o = &model->arch->options[i];
        char text[MILI_OPTION_VALUE_SIZE];
        mili_option_print(o, model->config, text, sizeof text, 1);
        at += (size_t)snprintf(MILI_ROOM, "%s\"%s\":%s", i ? "," : "", o->name, text);
    }
    at += (size_t)snprintf(MILI_ROOM, "}");
#undef MILI_ROOM
    return at;
}

// A parameter by key, without any prefix.
MILI_FN mil_param *mili_param_find(const mil_model *model, const char *key)
{
    for (int64_t i = 0; i < model->param_count; i++) if (strcmp(model->param[i]->key, key) == 0) return model->param[i];
    for (int64_t i = 0; i < model->alias_count; i++) if (strcmp(model->alias[i].key, key) == 0) return model->alias[i].param;
    return NULL;
}

// What follows a wrapper's prefix in key, or NULL.
MILI_FN const char *mili_without_prefix(const mil_architecture *arch, const char *key)
{
    const size_t own = arch->prefix ? strlen(arch->prefix) : 0;
    if (strncmp(key, "module.", 7) == 0) return key + 7;
    if (own && strncmp(key, arch->prefix, own) == 0) return key + own;
    if (strncmp(key, "model.", 6) == 0) return key + 6;
    return key[0] == '.' ? key + 1 : NULL;                 // "model..a.b", as MIL-Lab's hub loader writes it
}

MIL_DEF mil_param *mil_model_find(const mil_model *model, const char *key)
{
    if (!model) return NULL;
    for (; key; key = mili_without_prefix(model->arch, key)) {                       // as it is, then without the prefixes of wrappers
        mil_param *p = mili_param_find(model, key);
        if (p) return p;
    }
    return NULL;
}

// What read and write ask of the caller.
MILI_FN mil_status mili_param_asked(const mil_param *param, const void *memory, int64_t count, const char *where)
{
    mil_context *ctx = param->model->ctx;
    if (!memory) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: %s: the caller's memory is NULL", where, param->key);
    if (param->dtype != MIL_REAL_DTYPE) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: %s holds %s, no mil_real", where, param->key, mil_dtype_name(param->dtype));
    if (count != param->count) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: %s has %lld elements, not %lld", where, param->key, (long long)param->count, (long long)count);
    return MIL_OK;
}

MIL_DEF mil_status mil_param_read(const mil_param *param, mil_real *dst, int64_t count)
{
    if (!param) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = param->model->ctx;
    mili_enter(ctx);
    if (mili_param_asked(param, dst, count, "mil_param_read") != MIL_OK) return ctx->status;
    if (ctx->backend) ctx->backend->synchronize(ctx->backend_self);
    return mili_download(ctx, dst, param->data, (size_t)count * sizeof *dst);
}

MIL_DEF mil_status mil_param_write(mil_param *param, const mil_real *src, int64_t count)
{
    if (!param) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = param->model->ctx;
    mili_enter(ctx);
    if (mili_param_asked(param, src, count, "mil_param_write") != MIL_OK) return ctx->status;
    if (mili_not_averaged(param->model, "mil_param_write") != MIL_OK) return ctx->status;
    param->version++;
    return mili_upload(ctx, param->data, src, (size_t)count * sizeof *src);
}

// ---- metadata and class names ----
MILI_FN int mili_is_own_meta(const char *key)              // what mil_save writes
{
    static const char *const own[] = { "format", "mil.model", "mil.config", "mil.classes", "mil.version" };
    for (int i = 0; i < MILI_COUNT(own); i++) if (strcmp(key, own[i]) == 0) return 1;
    return 0;
}

MIL_DEF mil_status mil_model_set_metadata(mil_model *model, const char *key, const char *value)
{
    if (!model) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = model->ctx;
    mili_enter(ctx);
    if (!key || !*key) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_model_set_metadata: no key");
    if (mili_is_own_meta(key)) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_model_set_metadata: %s is written by mil_save itself", key);
    if (!mili_utf8_valid(key, strlen(key)) || (value && !mili_utf8_valid(value, strlen(value))))
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_model_set_metadata: %s: key or value is not UTF-8, and could not be saved", mili_quote(key).text);
    mili_pair fresh;
    memset(&fresh, 0, sizeof fresh);
    if (value) {
        const size_t nk = strlen(key) + 1, nv = strlen(value) + 1;
        if (!mili_reserve(ctx, (void **)&model->meta, &model->meta_capacity, model->meta_count + 1, sizeof *model->meta)) return ctx->status;
        fresh.bytes = nk + nv;
        fresh.key = (char *)mili_alloc(ctx, fresh.bytes);
        if (!fresh.key) return ctx->status;
        fresh.value = fresh.key + nk;
        memcpy(fresh.key, key, nk);
        memcpy(fresh.value, value, nv);
    }
    for (int64_t i = 0; i < model->meta_count; i++) {
        if (strcmp(model->meta[i].key, key) != 0) continue;
        mili_free(ctx, model->meta[i].key, model->meta[i].bytes);
        model->meta[i] = model->meta[--model->meta_count];
        break;
    }
    if (value) model->meta[model->meta_count++] = fresh;
    return MIL_OK;
}

MIL_DEF const char *mil_model_metadata(const mil_model *model, const char *key)
{
    for (int64_t i = 0; model && key && i < model->meta_count; i++) if (strcmp(model->meta[i].key, key) == 0) return model->meta[i].value;
    return NULL;
}

MIL_DEF mil_status mil_model_set_class_names(mil_model *model, const char *const *names, int64_t count)
{
    if (!model) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = model->ctx;
    mili_enter(ctx);
    const int64_t wanted = mil_model_num_classes(model);
    if (!names || (count != wanted && !(wanted == 1 && count == 2)))
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_model_set_class_names: %lld names for %lld classes", (long long)count, (long long)wanted);
    char **copy = (char **)mili_alloc_zero(ctx, (size_t)count * sizeof *copy);
    for (int64_t i = 0; copy && i < count; i++) {
        const size_t n = names[i] ? strlen(names[i]) + 1 : 0;
        if (!n) mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_model_set_class_names: name %lld is NULL", (long long)i);
        else copy[i] = (char *)mili_alloc(ctx, n);
        if (copy[i]) memcpy(copy[i], names[i], n);
    }
    char **drop = ctx->status == MIL_OK ? model->class_name : copy;
    const int64_t drops = ctx->status == MIL_OK ? model->class_count : copy ? count : 0;
    for (int64_t i = 0; i < drops; i++) if (drop[i]) mili_free(ctx, drop[i], strlen(drop[i]) + 1);
    mili_free(ctx, (void *)drop, (size_t)drops * sizeof *drop);
    if (ctx->status != MIL_OK) return ctx->status;
    model->class_name = copy;
    model->class_count = count;
    return MIL_OK;
}

MIL_DEF const char *mil_model_class_name(const mil_model *model, int64_t i)
{
    return model && i >= 0 && i < model->class_count ? model->class_name[i] : NULL;
}

// ---- loading ----
MIL_DEF mil_load_options mil_load_options_default(void)
{
    mil_load_options o;
    memset(&o, 0, sizeof o);
    o.check_finite = 1;
    return o;
}

// Whether a key belongs to the classification head: to what new_head leaves fresh, or to the parts that are loaded where both
// sides have them.
enum { MILI_NO_HEAD, MILI_HEAD, MILI_HEAD_SHARED };
MILI_FN int mili_head_kind(const mil_architecture *arch, const char *key)
{
    for (const char *at = arch->head; at && *at; ) {
        const size_t n = strcspn(at, " "), shared = n && at[n - 1] == '?', length = n - shared;
        if (strncmp(key, at, length) == 0 && (key[length] == '.' || key[length] == 0)) return shared ? MILI_HEAD_SHARED : MILI_HEAD;
        at += n;
        while (*at == ' ') at++;
    }
    return MILI_NO_HEAD;
}

MILI_FN int mili_is_head(const mil_architecture *arch, const char *key) { return mili_head_kind(arch, key) == MILI_HEAD; }

// The same of a tensor's name, which the model need not have.
MILI_FN int mili_head_kind_of_name(const mil_architecture *arch, const char *name)
{
    for (;;) {
        const char *key = mili_without_prefix(arch, name);
        const int kind = mili_head_kind(arch, name);
        if (kind || !key) return kind;
        name = key;
    }
}

// Names that are too many for one sentence are counted.
typedef struct mili_name_list { char text[360]; int64_t count; } mili_name_list;

MILI_FN void mili_name_list_add(mili_name_list *list, const char *name)
{
    const size_t at = strlen(list->text);
    if (list->count++ < 6) snprintf(list->text + at, sizeof list->text - at, "%s%.80s", at ? ", " : "", name);
    else if (list->count == 7) snprintf(list->text + at, sizeof list->text - at, ", ...");
}

// Elements of t, from any dtype and strides, to a parameter's dtype.
MILI_FN void mili_tensor_convert(const mil_context *ctx, const mil_tensor *t, mil_dtype dtype, void *dst)
{
    int64_t stride[MIL_MAX_RANK];
    mili_tensor_strides(t, stride);
    const int64_t count = mil_tensor_count(t), cols = t->rank ? t->shape[t->rank - 1] : 1, step = t->rank ? stride[t->rank - 1] : 0;
    const int64_t width = (int64_t)mil_dtype_size(t->dtype);
    for (int64_t r = 0; cols && r < count / cols; r++) {
        const char *src = (const char *)t->data;
        int64_t at = r;
        for (int a = t->rank - 2; a >= 0; a--) { src += at % t->shape[a] * stride[a]; at /= t->shape[a]; }
        if (dtype == MIL_REAL_DTYPE && step == width) { mili_convert(ctx->kernels, (mil_real *)dst + r * cols, src, t->dtype, cols); continue; }
        for (int64_t j = 0; j < cols; j++) {
            mil_real v = 0;
            if (dtype == MIL_I64 && t->dtype == MIL_I64) { memcpy((int64_t *)dst + r * cols + j, src + j * step, sizeof(int64_t)); continue; }
            mili_convert(ctx->kernels, &v, src + j * step, t->dtype, 1);
            if (dtype != MIL_I64) ((mil_real *)dst)[r * cols + j] = v;
            else ((int64_t *)dst)[r * cols + j] = mili_is_finite(v) && mili_fabs(v) < (mil_real)9e18 ? (int64_t)v : 0;
        }
    }
}

MILI_FN int mili_tensor_finite(const mil_context *ctx, const mil_tensor *t)
{
    if (t->dtype != MIL_F32 && t->dtype != MIL_F64 && t->dtype != MIL_F16 && t->dtype != MIL_BF16) return 1;
    const size_t width = mil_dtype_size(t->dtype);
    const int64_t count = mil_tensor_count(t);
    for (int64_t i = 0; i < count; i++) {                  // tensors of a safetensors file are packed
        mil_real v;
        mili_convert(ctx->kernels, &v, (const char *)t->data + (size_t)i * width, t->dtype, 1);
        if (!mili_is_finite(v)) return 0;
    }
    return 1;
}

MILI_FN mil_status mili_load_tensors(mil_model *model, const mil_tensors *file, const mil_load_options *options, const char *where)
{
    mil_context *ctx = model->ctx;
    mil_load_options o = options ? *options : mil_load_options_default();
    mili_name_list missing, extra;
    memset(&missing, 0, sizeof missing);
    memset(&extra, 0, sizeof extra);
    int64_t missing_head = 0;
    const int64_t tensors = mil_tensors_count(file);
    int64_t *from = (int64_t *)mili_alloc(ctx, (size_t)(model->param_count + 1) * sizeof *from);    // which tensor fills which parameter
    size_t room = 0;
    void *copy = NULL;
    if (!from) return ctx->status;
    for (int64_t i = 0; i < model->param_count; i++) from[i] = -1;
    if (mili_not_averaged(model, where) != MIL_OK) goto done;

    for (int64_t t = 0; t < tensors; t++) {
        const char *name = mil_tensors_name(file, t);
        const mil_param *p = mil_model_find(model, name);
        if (!p && o.new_head && mili_head_kind_of_name(model->arch, name)) continue;
        if (!p) { mili_name_list_add(&extra, name); continue; }
        if (o.new_head && mili_is_head(model->arch, p->key)) continue;
        int64_t i = 0;
        while (model->param[i] != p) i++;
        if (from[i] >= 0) {
            mili_fail(ctx, MIL_ERROR_FORMAT, "%s: %s and %s are both %s", where, mil_tensors_name(file, from[i]), name, p->key);
            goto done;
        }
        from[i] = t;
        const mil_tensor *tensor = mil_tensors_at(file, t);
        int same = tensor->rank == p->rank;
        for (int a = 0; same && a < p->rank; a++) same = tensor->shape[a] == p->shape[a];
        if (!same) {
            mili_fail(ctx, MIL_ERROR_SHAPE, "%s: %s is %s, the model %s has %s", where, name, mili_shape_text(tensor->rank, tensor->shape).s, model->name, mili_shape_text(p->rank, p->shape).s);
            goto done;
        }
        if (o.check_finite && !mili_tensor_finite(ctx, tensor)) {
            mili_fail(ctx, MIL_ERROR_NUMERIC, "%s: %s holds NaN or infinity", where, name);
            goto done;
        }
    }
    for (int64_t i = 0; i < model->param_count; i++) {
        const mil_param *p = model->param[i];
        const int head = mili_head_kind(model->arch, p->key);
        if (from[i] < 0 && !(o.new_head && head)) { mili_name_list_add(&missing, p->key); missing_head += head != MILI_NO_HEAD; }
        room = MILI_MAX(room, (size_t)p->count * mil_dtype_size(p->dtype));
    }
    if ((missing.count && !o.allow_missing) || (extra.count && !o.allow_extra)) {
        mili_fail(ctx, MIL_ERROR_UNKNOWN, "%s does not fit %s:%s%s%s%s%s%s", where, model->name, missing.count && !o.allow_missing ? " missing " : "",
                  missing.count && !o.allow_missing ? missing.text : "", missing.count && extra.count && !o.allow_missing && !o.allow_extra ? ";" : "",
                  extra.count && !o.allow_extra ? " not in the model " : "", extra.count && !o.allow_extra ? extra.text : "",
                  missing.count && missing_head == missing.count && !o.allow_missing && (!extra.count || o.allow_extra) ? "; mil_load_options.new_head leaves the classification head fresh" : "");
        goto done;
    }
    if (!mili_host_memory(ctx) && !(copy = mili_alloc(ctx, room))) goto done;
    for (int64_t i = 0; i < model->param_count; i++) {
        mil_param *p = model->param[i];
        if (from[i] < 0) continue;
        mili_tensor_convert(ctx, mil_tensors_at(file, from[i]), p->dtype, copy ? copy : p->data);
        if (copy && mili_upload(ctx, p->data, copy, (size_t)p->count * mil_dtype_size(p->dtype)) != MIL_OK) goto done;
        p->version++;
    }
done:
    mili_free(ctx, copy, room);
    mili_free(ctx, from, (size_t)(model->param_count + 1) * sizeof *from);
    return ctx->status;
}

MIL_DEF mil_status mil_load_memory(mil_model *model, const void *bytes, size_t size, const mil_load_options *options)
{
    if (!model) return MIL_ERROR_ARGUMENT;
    mil_tensors *file;
    if (mil_tensors_open_memory(model->ctx, bytes, size, 0, &file) != MIL_OK) return model->ctx->status;
    mili_load_tensors(model, file, options, "safetensors in memory");
    mil_tensors_free(file);
    return model->ctx->status;
}

// Whether all tensors of the file are the model's, and the file lacks nothing but perhaps the whole head.
MILI_FN int mili_fits_model(const mil_model *model, const mil_tensors *file)
{
    int64_t heads = 0, found = 0, found_heads = 0;
    const int64_t tensors = mil_tensors_count(file);
    for (int64_t i = 0; i < model->param_count; i++) heads += mili_is_head(model->arch, model->param[i]->key);
    for (int64_t t = 0; t < tensors; t++) {
        const mil_param *p = mil_model_find(model, mil_tensors_name(file, t));
        found += p != NULL;
        found_heads += p && mili_is_head(model->arch, p->key);
    }
    return found == tensors && tensors - found_heads == model->param_count - heads && (found_heads == heads || !found_heads);
}

// How many elements a model that the file describes may have: a file's claims cost no more memory than its tensors justify.
MILI_FN int64_t mili_believable(const mil_tensors *file)
{
    int64_t elements = 0;
    for (int64_t t = 0; t < mil_tensors_count(file); t++) elements += mil_tensor_count(mil_tensors_at(file, t));
    return 2 * elements + 65536;                           // twice: a head may be missing
}

// The first model whose options are those of the config.json and whose parameters are the file's. 0: none, or no memory.
MILI_FN int mili_guess_model(mil_context *ctx, const mil_tensors *file, mili_json object, const char *ignored, char *name, size_t size)
{
    for (int64_t i = 0; mili_architecture_nth(ctx, i); i++) {
        const mil_architecture *arch = mili_architecture_nth(ctx, i);
        snprintf(name, size, "%s.%s", arch->name, arch->configs[0].name);
        mil_model *model = mili_model_new(ctx, name, NULL, &object, ignored, mili_believable(file));
        const int fits = model && mili_fits_model(model, file);
        mil_model_free(model);
        if (fits) return 1;
        if (ctx->status == MIL_ERROR_NO_MEMORY) return 0;
        mili_enter(ctx);
    }
    return 0;
}

// The model that a file's metadata, or a config.json, describe. `config` may be NULL.
MILI_FN mil_model *mili_open_tensors(mil_context *ctx, const mil_tensors *file, const char *config, size_t config_size, const char *where)
{
    const char *name = mil_tensors_meta(file, "mil.model"), *text = mil_tensors_meta(file, "mil.config");
    char model_name[192];
    mili_json object;
    // What Hugging Face's config.json holds beside the hyperparameters.
    const char *ignored = "architectures model_type torch_dtype dtype transformers_version _name_or_path id2label label2id auto_map return_dict";
    if (name && text) {
        if (mili_json_parse(ctx, "mil.config", text, strlen(text), 3, &object) != MIL_OK) return NULL;
        ignored = NULL;
    } else if (config) {
        if (mili_json_parse(ctx, "config.json", config, config_size, 8, &object) != MIL_OK) return NULL;
        mili_json type = mili_json_find(object, "model_type");
        int nul = 0;
        if (type.size && (mili_json_kind(type) != '"' || mili_json_copy(type, model_name, sizeof model_name, &nul) >= sizeof model_name || nul)) {
            mili_fail(ctx, MIL_ERROR_FORMAT, "config.json: model_type is not a model's name");
            return NULL;
        }
        if (!type.size && !mili_guess_model(ctx, file, object, ignored, model_name, sizeof model_name)) {
            if (ctx->status == MIL_OK) mili_fail(ctx, MIL_ERROR_FORMAT, "config.json beside %s has no model_type, and no model has just its options and the file's tensors", where);
            return NULL;
        }
        name = model_name;
    } else {
        mili_fail(ctx, MIL_ERROR_FORMAT, "%s does not say which model it is for: no mil.model in its metadata, no config.json beside it; use mil_create and mil_load", where);
        return NULL;
    }
    mil_model *model = mili_model_new(ctx, name, NULL, &object, ignored, mili_believable(file));
    if (!model) return NULL;
    mil_load_options o = mil_load_options_default();
    int head = 0, has_head = 0;
    for (int64_t i = 0; i < model->param_count; i++) has_head |= mili_is_head(model->arch, model->param[i]->key);
    for (int64_t t = 0; t < mil_tensors_count(file); t++) {
        const mil_param *p = mil_model_find(model, mil_tensors_name(file, t));
        head |= p && mili_is_head(model->arch, p->key);
    }
    o.new_head = has_head && !head;                        // published encoders of slides come without one
    if (mili_load_tensors(model, file, &o, where) == MIL_OK && o.new_head) mil_model_set_metadata(model, "mil.head", "fresh");
    for (int64_t i = 0; i < mil_tensors_meta_count(file) && ctx->status == MIL_OK; i++) {
        const char *key = mil_tensors_meta_key(file, i);
        if (*key && !mili_is_own_meta(key)) mil_model_set_metadata(model, key, mil_tensors_meta_value(file, i));
    }
    const char *classes = mil_tensors_meta(file, "mil.classes");
    if (classes && ctx->status == MIL_OK) {                // a JSON list of names
        mili_json list, key, value;
        if (mili_json_parse(ctx, "mil.classes", classes, strlen(classes), 2, &list) == MIL_OK && mili_json_kind(list) != '[')
            mili_fail(ctx, MIL_ERROR_FORMAT, "%s: mil.classes is not a list of names", where);
        else if (ctx->status == MIL_OK) {
            const int64_t count = mili_json_count(list);
            const size_t bytes = strlen(classes) + 1;
            char *texts = (char *)mili_alloc(ctx, bytes);
            const char **names = (const char **)mili_alloc(ctx, (size_t)MILI_MAX(count, 1) * sizeof *names);
            size_t at = 0;
            int64_t i = 0;
            int nul = 0;
            mili_json_iter it = mili_json_begin(list);
            while (texts && names && mili_json_next(&it, &key, &value) && mili_json_kind(value) == '"') {
                names[i++] = texts + at;
                at += mili_json_copy(value, texts + at, bytes - at, &nul) + 1;
            }
            if (texts && names && i == count) mil_model_set_class_names(model, names, count);
            else if (texts && names) mili_fail(ctx, MIL_ERROR_FORMAT, "%s: mil.classes is not a list of names", where);
            mili_free(ctx, (void *)names, (size_t)MILI_MAX(count, 1) * sizeof *names);
            mili_free(ctx, texts, bytes);
        }
    }
    if (ctx->status != MIL_OK) { mil_model_free(model); return NULL; }
    return model;
}

MIL_DEF mil_model *mil_open_memory(mil_context *ctx, const void *bytes, size_t size)
{
    mil_tensors *file;
    if (!ctx || mil_tensors_open_memory(ctx, bytes, size, 0, &file) != MIL_OK) return NULL;
    mil_model *model = mili_open_tensors(ctx, file, NULL, 0, "weights");
    mil_tensors_free(file);
    return model;
}

// ---- saving ----
// Everything that a file of weights holds, as the writer wants it. Freed by mili_saved_free.
typedef struct mili_saved {
    mil_tensor  *tensor;
    const char **name;
    mil_meta    *meta;
    int64_t      count, meta_count, meta_room;
    mili_arena   arena;
} mili_saved;

MILI_FN void mili_saved_free(mil_context *ctx, mili_saved *s) { mili_arena_free(ctx, &s->arena); }

MILI_FN void mili_saved_meta(mili_saved *s, const char *key, const char *value)
{
    s->meta[s->meta_count].key = key;
    s->meta[s->meta_count++].value = value;
}

MILI_FN mil_status mili_saved_make(mil_model *model, mili_saved *s)
{
    mil_context *ctx = model->ctx;
    memset(s, 0, sizeof *s);
    const size_t n = (size_t)MILI_MAX(model->param_count, 1), config_size = mil_model_config(model, NULL, 0) + 1;
    s->tensor = (mil_tensor *)mili_arena_alloc(ctx, &s->arena, n * sizeof *s->tensor);
    s->name = (const char **)mili_arena_alloc(ctx, &s->arena, n * sizeof *s->name);
    s->meta = (mil_meta *)mili_arena_alloc(ctx, &s->arena, (size_t)(model->meta_count + 4) * sizeof *s->meta);
    char *config = (char *)mili_arena_alloc(ctx, &s->arena, config_size);
    if (!s->tensor || !s->name || !s->meta || !config) return ctx->status;
    mil_model_config(model, config, config_size);
    mili_saved_meta(s, "mil.config", config);
    mili_saved_meta(s, "mil.model", model->name);
    mili_saved_meta(s, "mil.version", MIL_VERSION);
    if (model->class_count) {
        size_t room = 3, at = 0;
        for (int64_t i = 0; i < model->class_count; i++) room += mili_json_string(NULL, 0, model->class_name[i]) + 1;
        char *list = (char *)mili_arena_alloc(ctx, &s->arena, room);
        if (!list) return ctx->status;
        for (int64_t i = 0; i < model->class_count; i++) {
            list[at++] = i ? ',' : '[';
            at += mili_json_string(list + at, room - at, model->class_name[i]);
        }
        list[at++] = ']';
        list[at] = 0;
        mili_saved_meta(s, "mil.classes", list);
    }
    for (int64_t i = 0; i < model->meta_count; i++) mili_saved_meta(s, model->meta[i].key, model->meta[i].value);
    const char *prefix = model->arch->prefix ? model->arch->prefix : "";
    for (int64_t i = 0; i < model->param_count; i++) {
        const mil_param *p = model->param[i];
        const size_t size = strlen(prefix) + strlen(p->key) + 1, bytes = (size_t)p->count * mil_dtype_size(p->dtype);
        char *name = (char *)mili_arena_alloc(ctx, &s->arena, size);
        if (!name) return ctx->status;
        snprintf(name, size, "%s%s", prefix, p->key);
        const void *data = p->data;
        if (!mili_host_memory(ctx)) {
            void *copy = mili_arena_alloc(ctx, &s->arena, bytes);
            if (!copy) return ctx->status;
            ctx->backend->synchronize(ctx->backend_self);
            if (mili_download(ctx, copy, p->data, bytes) != MIL_OK) return ctx->status;
            data = copy;
        }
        s->name[i] = name;
        s->tensor[i] = mil_tensor_make(data, p->dtype, p->rank, p->shape);
        s->count++;
    }
    return MIL_OK;
}

MIL_DEF mil_status mil_save_memory(mil_model *model, void *dst, size_t *size)
{
    if (!model) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = model->ctx;
    mili_enter(ctx);
    mili_saved s;
    if (mili_saved_make(model, &s) == MIL_OK) mil_tensors_write_memory(ctx, s.tensor, s.name, s.count, s.meta, s.meta_count, dst, size);
    mili_saved_free(ctx, &s);
    return ctx->status;
}

#ifndef MIL_NO_STDIO
MIL_DEF mil_status mil_load_with(mil_model *model, const char *path, const mil_load_options *options)
{
    if (!model) return MIL_ERROR_ARGUMENT;
    mil_tensors *file;
    if (mil_tensors_open(model->ctx, path, 0, &file) != MIL_OK) return model->ctx->status;
    mili_load_tensors(model, file, options, path);
    mil_tensors_free(file);
    return model->ctx->status;
}

MIL_DEF mil_status mil_load(mil_model *model, const char *path) { return mil_load_with(model, path, NULL); }

MIL_DEF mil_model *mil_open(mil_context *ctx, const char *path)
{
    mil_tensors *file;
    mil_file *beside = NULL;
    if (!ctx || mil_tensors_open(ctx, path, 0, &file) != MIL_OK) return NULL;
    if (!mil_tensors_meta(file, "mil.model")) {            // a foreign file: the hyperparameters may stand beside it
        const char *slash = strrchr(path, '/');
        const size_t folder = slash ? (size_t)(slash - path) + 1 : 0, room = folder + sizeof "config.json";
        char *config = (char *)mili_alloc(ctx, room);
        if (config) {
            memcpy(config, path, folder);
            memcpy(config + folder, "config.json", sizeof "config.json");
            if (mil_file_open(ctx, config, 1 << 20, MIL_FILE_READ, &beside) == MIL_ERROR_IO) mili_enter(ctx);    // none there
            mili_free(ctx, config, room);
        }
    }
    mil_model *model = NULL;
    if (ctx->status == MIL_OK)
        model = mili_open_tensors(ctx, file, beside ? (const char *)mil_file_data(beside) : NULL, beside ? mil_file_size(beside) : 0, path);
    mil_file_free(beside);
    mil_tensors_free(file);
    return model;
}

MIL_DEF mil_status mil_save(mil_model *model, const char *path)
{
    if (!model) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = model->ctx;
    mili_enter(ctx);
    mili_saved s;
    if (mili_saved_make(model, &s) == MIL_OK) mil_tensors_write(ctx, path, s.tensor, s.name, s.count, s.meta, s.meta_count);
    mili_saved_free(ctx, &s);
    return ctx->status;
}
#endif

// ---- recording a forward pass ----
MIL_DEF mil_bag mil_bag_make(const float *features, int64_t instances, int64_t dim)
{
    mil_bag bag;
    memset(&bag, 0, sizeof bag);
    bag.features = mil_tensor_matrix(features, MIL_F32, instances, dim);
    return bag;
}

MIL_DEF mil_bag mil_bag_from(const mil_tensor *features)
{
    mil_bag bag;
    memset(&bag, 0, sizeof bag);
    if (features) bag.features = *features;
    return bag;
}

MIL_DEF mil_target mil_target_class(int64_t label)
{
    mil_target t;
    memset(&t, 0, sizeof t);
    t.loss = MIL_LOSS_CE;
    t.label = label;
    t.count = 1;
    t.weight = 1;
    t.pos_weight = 1;
    return t;
}

MIL_DEF mil_target mil_target_value(double value)
{
    mil_target t = mil_target_class(0);
    t.loss = MIL_LOSS_BCE;
    t.value = value;
    return t;
}

MIL_DEF mil_node *mil_outputs_find(const mil_outputs *out, const char *name)
{
    if (!out || !name) return NULL;
    if (strcmp(name, "logits") == 0) return out->logits;
    if (strcmp(name, "loss") == 0) return out->loss;
    if (strcmp(name, "attention") == 0) return out->attention;
    if (strcmp(name, "attention_scores") == 0) return out->attention_scores;
    if (strcmp(name, "attention_weights") == 0) return out->attention_weights;
    if (strcmp(name, "contribution") == 0) return out->contribution;
    if (strcmp(name, "slide_feats") == 0) return out->slide_feats;
    if (strcmp(name, "features") == 0) return out->features;
    for (int i = 0; i < out->extra_count; i++) if (strcmp(out->extra[i].name, name) == 0) return out->extra[i].node;
    return NULL;
}

MIL_DEF void mil_output(mil_outputs *out, const char *name, mil_node *node)
{
    if (!node) return;
    if (out->extra_count == MIL_MAX_OUTPUTS) {
        mil_tape_fail(node->tape, MIL_ERROR_UNSUPPORTED, "output %s: a model has at most %d outputs by name", name, MIL_MAX_OUTPUTS);
        return;
    }
    out->extra[out->extra_count].name = name;
    out->extra[out->extra_count++].node = node;
}

MIL_DEF mil_node *mil_inputs_find(const mil_inputs *in, const char *name)
{
    for (int i = 0; i < in->bag->extra_count; i++)
        if (in->bag->extra[i].name && strcmp(in->bag->extra[i].name, name) == 0) return mil_input(in->tape, name, &in->bag->extra[i].tensor);
    return NULL;
}

// A tensor [N, ..] as [1, N, ..]; one that has the batch axis stays.
MILI_FN int mili_with_batch(mil_tensor *t, int rank)
{
    if (t->rank == rank) return 1;
    if (t->rank != rank - 1) return 0;
    int64_t stride[MIL_MAX_RANK];
    mili_tensor_strides(t, stride);
    for (int a = rank - 1; a > 0; a--) { t->shape[a] = t->shape[a - 1]; t->stride[a] = stride[a - 1]; }
    t->shape[0] = 1;
    t->stride[0] = (int64_t)((uint64_t)stride[0] * (uint64_t)t->shape[1]);    // of the only bag: may wrap, is never used
    t->rank = rank;
    return 1;
}

// The first real row of the bag that holds NaN or infinity, counted over all bags of a batch; -1: none does. The bag's shapes
// have been checked.
MILI_FN int64_t mili_bag_not_finite(const mil_context *ctx, const mil_bag *bag)
{
    const mili_kernels *K = ctx->kernels;
    mil_tensor x = bag->features, mask = bag->mask;
    int64_t stride[MIL_MAX_RANK], mask_stride[MIL_MAX_RANK];
    mil_real part[64];
    mili_with_batch(&x, 3);
    mili_tensor_strides(&x, stride);
    if (mask.data) {
        mili_with_batch(&mask, 2);
        mili_tensor_strides(&mask, mask_stride);
    }
    const int64_t N = x.shape[1], D = x.shape[2], width = (int64_t)mil_dtype_size(x.dtype);
    for (int64_t r = 0; r < x.shape[0] * N; r++) {
        const char *at = (const char *)x.data + r / N * stride[0] + r % N * stride[1];
        if (mask.data) {
            mili_convert(K, part, (const char *)mask.data + r / N * mask_stride[0] + r % N * mask_stride[1], mask.dtype, 1);
            if (part[0] == 0) continue;
        }
        if (x.dtype == MIL_REAL_DTYPE && stride[2] == width && (uintptr_t)at % sizeof(mil_real) == 0) {        // where it stands
            if (!K->finite((const mil_real *)(const void *)at, D)) return r;
            continue;
        }
        for (int64_t c = 0; c < D; c += MILI_COUNT(part)) {
            const int64_t n = MILI_MIN(D - c, MILI_COUNT(part));
            if (stride[2] == width) mili_convert(K, part, at + c * width, x.dtype, n);
            else for (int64_t i = 0; i < n; i++) mili_convert(K, part + i, at + (c + i) * stride[2], x.dtype, 1);
            if (!K->finite(part, n)) return r;
        }
    }
    return -1;
}

MILI_FN mil_node *mili_bag_input(mil_tape *tape, const char *name, const mil_tensor *t, int rank, int64_t B, int64_t N, int64_t cols)
{
    mil_tensor copy = *t;
    if (!t->data) return NULL;
    if (mil_tensor_count(t) < 0 || !mili_with_batch(&copy, rank) || copy.shape[0] != B || copy.shape[1] != N || (rank > 2 && copy.shape[2] != cols)) {
        mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "bag: %s is %s, the features have %lld bags of %lld instances", name,
                      mili_shape_text(MILI_MAX(0, MILI_MIN(t->rank, MIL_MAX_RANK)), t->shape).s, (long long)B, (long long)N);
        return NULL;
    }
    return mil_input(tape, name, &copy);
}

MIL_DEF mil_status mil_model_record(mil_tape *tape, mil_model *model, const mil_bag *bag, const mil_target *target, mil_outputs *out)
{
    if (!tape) return MIL_ERROR_ARGUMENT;
    if (out) memset(out, 0, sizeof *out);
    if (tape->status != MIL_OK) return mili_tape_report(tape);
    if (!model || !bag || !out) { mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "mil_model_record: model, bag or out is NULL"); return mili_tape_report(tape); }
    mil_inputs in;
    memset(&in, 0, sizeof in);
    mil_tensor f = bag->features;
    mil_tape_push(tape, model->arch->name);
    const int64_t D = mil_model_in_dim(model);
    if (mil_tensor_count(&f) < 0 || !f.data || (f.rank != 2 && f.rank != 3))
        mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "bag: features must be [N, %lld] or [B, N, %lld] with data", (long long)D, (long long)D);
    else if (f.shape[f.rank - 1] != D)
        mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "bag: features %s, the model takes width %lld", mili_shape_text(f.rank, f.shape).s, (long long)D);
    else if (D > 1 && !mili_tensor_packed(&f) && f.stride[f.rank - 1] == 0)    // only the rows' stride was set: each row would be one number, repeated
        mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "bag: features: stride[%d] is 0 beside strides that are not; for whole rows it is %lld, the bytes of one element",
                      f.rank - 1, (long long)mil_dtype_size(f.dtype));
    else if (!mili_with_batch(&f, 3) || f.shape[0] < 1 || f.shape[1] < 1)
        mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "bag: features %s hold no instance", mili_shape_text(bag->features.rank, bag->features.shape).s);
    else if (f.shape[0] > 1 && !(model->arch->flags & MIL_MODEL_BATCHES))
        mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "bag: %lld bags in one call, the model takes one", (long long)f.shape[0]);
    else if (bag->mask.data && !(model->arch->flags & MIL_MODEL_MASK))
        mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "bag: the model has no mask");
    else if (!bag->coords.data && (model->arch->flags & MIL_MODEL_COORDS))
        mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "bag: the model needs coords");
    else if (target && !(target->weight > 0 && mili_is_finite_f64(target->weight)))
        mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "target: weight is %g, not above 0; make targets by mil_target_class or mil_target_value", target->weight);
    else {
        in.tape = tape;
        in.ctx = tape->ctx;
        in.bag = bag;
        in.target = target;
        in.features = out->features = mil_input(tape, "features", &f);
        if (in.features && (tape->options & (1u << MIL_TAPE_INPUT_GRADS))) in.features->flags |= MILI_WANTS_GRAD;
        in.mask = mili_bag_input(tape, "mask", &bag->mask, 2, f.shape[0], f.shape[1], 0);
        if (in.mask) in.mask = mil_mask_fill(mil_constant(tape, 2, in.mask->shape, 1), in.mask, 0);        // any number but 0 is 1
        in.coords = mili_bag_input(tape, "coords", &bag->coords, 3, f.shape[0], f.shape[1], 2);
        if (tape->status == MIL_OK) model->arch->forward(model->layers, model->config, &in, out);
        if (out->loss && target && target->weight != 1) out->loss = mil_affine(out->loss, target->weight, 0);
    }
    mil_tape_pop(tape);
    return mili_tape_report(tape);
}

// ==== >>model-blocks: the models ==================================================================================
//
// Each block: the paper and its equations, the table of options (names and defaults of the reference), the parameters under
// the reference's keys, the forward pass. x [B, N, in_dim] are the instances of B bags. Where a bag may have a mask, what is
// missing takes no part in a softmax over n; the equations leave that out.

// A model's list of options makes the struct that they fill, T_config, with a member each, and the table T_options.
#define MILI_CONFIG_MEMBER(T, type, member, value, range, doc) MILI_C_##type member;
#define MILI_CONFIG_ROW(T, type, member, value, range, doc) { #member, MIL_OPTION_##type, offsetof(T##_config, member), value, range, doc },
#define MILI_CONFIG(T, LIST)                                              \
    typedef struct T##_config { LIST(MILI_CONFIG_MEMBER, T) } T##_config; \
    static const mil_option T##_options[] = { LIST(MILI_CONFIG_ROW, T) }

static const mil_config mili_base_configs[] = { { "base", "" } };

// Scores of missing instances become the most negative number, and their features zero, so that a NaN in padding spoils
// nothing. The most negative number and not -inf: scores of a bag without any real instance are then all equal, and its attention
// is uniform over all N, as the references' is (a softmax over -inf alone would be NaN there, zeros here). Where there is a real
// instance, exp(-max - m) is 0. Features of a bag without one are not zeroed.
MILI_FN mil_node *mili_mask_column(mil_node *mask)         // [B, N] -> [B, N, 1]
{
    if (!mask) return NULL;
    const int64_t shape[3] = { mask->shape[0], mask->shape[1], 1 };
    return mil_reshape(mask, 3, shape);
}

MILI_FN mil_node *mili_mask_real(mil_node *mask)           // mask [B, N, 1], with ones for a bag that has none
{
    return mil_maximum(mask, mil_affine(mil_max(mask, 1), -1, 1));             // 1 - max is 1 exactly when the bag has no real instance
}

MILI_FN mil_node *mili_mask_features(mil_node *x, mil_node *mask)              // mask [B, N, 1] or NULL
{
    return mask ? mil_mask_fill(x, mili_mask_real(mask), 0) : x;
}

// Scores to pool by: missing instances get the most negative number. A bag without a real instance gets zeros instead, equal
// too, because softmax by way of a log-sum-exp would lose log N beside so large a number; a - a, since the references add that
// number to a and so let the gradient through to it.
MILI_FN mil_node *mili_mask_scores(mil_node *a, mil_node *mask)                // a [B, N, K], mask [B, N, 1] or NULL
{
    if (!mask) return a;
    mil_node *none = mil_affine(mil_max(mask, 1), -1, 1);                      // [B, 1, 1]  1 for such a bag
    a = mil_sub(a, mil_mask_fill(mil_detach(a), none, 0));
    return mil_mask_fill(a, mili_mask_real(mask), -(double)MILI_REAL_MAX);
}

// Each bag's own rows: y[b,k] = x[b, index[b,k]].  x [B, N, E], index [B, 1, K] -> [B, K, E]
MILI_FN mil_node *mili_gather_bags(mil_node *x, mil_node *index)
{
    if (!x || !index) return NULL;
    const int64_t shape[3] = { x->shape[0], -1, 1 };
    return mil_gather_rows(x, mil_reshape(index, 3, shape));
}

// Learned tokens [1, count, width], and these for each bag: [1, k, E] -> [B, k, E].
MILI_FN mil_param *mili_declare_token(mil_builder *b, mil_init_kind kind, double a, int64_t count, int64_t width, const char *key)
{
    const mil_init init = { kind, a };
    const int64_t shape[3] = { 1, count, width };
    return mil_declare(b, init, 3, shape, "%s", key);
}

MILI_FN mil_node *mili_tokens(mil_tape *tape, mil_param *param, int64_t bags)
{
    mil_node *t = mil_use(tape, param);
    if (!t) return NULL;
    const int64_t shape[3] = { bags, t->shape[1], t->shape[2] };
    return mil_broadcast(t, 3, shape);
}

MILI_FN int64_t mili_square_side(int64_t n)                // ceil(sqrt n)
{
    int64_t s = (int64_t)sqrt((double)n);
    while (s > 0 && (s - 1) * (s - 1) >= n) s--;
    while (s * s < n) s++;
    return s;
}

// x [B, N, E] and its first rows again, so that there are `rows`, N to 2 N.
MILI_FN mil_node *mili_wrap_rows(mil_node *x, int64_t rows)
{
    if (!x || rows == x->shape[1]) return x;
    mil_node *part[2] = { x, mil_slice(x, 1, 0, rows - x->shape[1]) };
    return mil_concat(part, 2, 1);
}

enum { MILI_MAX_BLOCKS = 32 };
MILI_FN void mili_push_block(mil_tape *tape, int64_t i)    // for error sentences
{
    char name[32];
    snprintf(name, sizeof name, "block%lld", (long long)i);
    mil_tape_push(tape, name);
}

// The summand of each instance in each logit, for pooling by weights p and a linear head: p_n (W h_n), without the bias.
// p [B, N, 1], h [B, N, E] -> [B, N, C]
MILI_FN mil_node *mili_contribution(const mil_linear_layer *head, mil_node *p, mil_node *h)
{
    if (!h || !p) return NULL;
    return mil_mul(mil_linear(h, mil_use(h->tape, head->weight), NULL), p);
}

// What attention pooling of h [B, N, E] tells beside its result: the scores [B, N, K] as they are to be reported, the weights
// softmax_n(pooled) of the scores that were pooled by (with a mask these differ), and, with a linear head and K = 1, the
// contributions. head NULL: without them.
MILI_FN void mili_report_attention(mil_outputs *out, mil_node *scores, mil_node *pooled, mil_node *h, const mil_linear_layer *head)
{
    out->attention_scores = scores;
    out->attention_weights = mil_softmax(pooled, 1);
    if (head) out->contribution = mili_contribution(head, out->attention_weights, h);
}

MILI_FN mil_node *mili_bag_loss(const mil_inputs *in, mil_node *logits)
{
#ifdef MIL_NO_TRAINING
    MILI_UNUSED(in);
    MILI_UNUSED(logits);
    return NULL;
#else
    return in->target ? mil_loss_node(logits, in->target) : NULL;
#endif
}

// The class that a target of one bag names.
MILI_FN int64_t mili_target_label(const mil_target *target)
{
    if (target->loss == MIL_LOSS_CE) return target->labels ? target->labels[0] : target->label;
    if (!target->values) return target->value > 0.5;
    int64_t best = 0;
    for (int64_t i = 1; i < target->count; i++) if (target->values[i] > target->values[best]) best = i;
    return target->count > 1 ? best : target->values[0] > 0.5;
}

// loss = w cls_loss + (1 - w) instance_loss, and both by name.
MILI_FN void mili_two_losses(mil_outputs *out, mil_node *cls, mil_node *instance, double w)
{
    mil_output(out, "cls_loss", cls);
    mil_output(out, "instance_loss", instance);
    out->loss = mil_add(mil_affine(cls, w, 0), mil_affine(instance, 1 - w, 0));
}

// Room for `count` elements that lives as long as the recording, zeroed. NULL with an error on the tape.
MILI_FN void *mili_tape_array(mil_tape *tape, int64_t count, size_t size)
{
    void *p = NULL;
    if (count >= 0 && (uint64_t)count <= SIZE_MAX / 2 / size) p = mili_arena_alloc(tape->ctx, &tape->arena, (size_t)count * size);
    else mili_fail(tape->ctx, MIL_ERROR_NO_MEMORY, "no memory for %lld elements", (long long)count);
    return p ? p : (void *)mili_tape_fail_ctx(tape);
}

// Room for `count` layers that lives as long as the model.
MILI_FN void *mili_declare_array(mil_builder *b, int64_t count, size_t size)
{
    void *p = mili_arena_alloc(b->model->ctx, &b->model->arena, (size_t)MILI_MAX(count, 1) * size);
    if (!p) b->status = b->model->ctx->status;
    return p;
}

// ---- abmil: attention-based pooling (Ilse, Tomczak, Welling, ICML 2018), as MIL-Lab has it -----------------------------
//   h_n = embed(x_n)      a_n = scorer(h_n)      p = softmax_n(a)      z = sum_n p_n h_n      logits = W z + b
#define MILI_ABMIL_OPTIONS(X, T)                                                                        \
    X(T, INT,  in_dim,        "1024", "1..1000000", "width D of an instance")                           \
    X(T, INT,  num_classes,   "2",    "0..1000000", "classes C; 0: no classifier, only slide features") \
    X(T, INT,  embed_dim,     "512",  "1..1000000", "width E of an embedded instance")                  \
    X(T, INT,  attn_dim,      "384",  "1..1000000", "width A inside the attention scorer")              \
    X(T, INT,  num_fc_layers, "1",    "1..16",      "layers of the patch MLP")                          \
    X(T, BOOL, gate,          "true", NULL,         "gated attention (eq. 9) or plain (eq. 8)")         \
    X(T, REAL, dropout,       "0.25", "0..1",       "rate between the MLP's layers and in the scorer")

MILI_CONFIG(mili_abmil, MILI_ABMIL_OPTIONS);

typedef struct mili_abmil { mil_patch_mlp embed; mil_attention_scorer scorer; mil_linear_layer classifier; } mili_abmil;

MILI_FN void mili_abmil_declare(mil_builder *b, void *model, const void *config)
{
    mili_abmil *m = (mili_abmil *)model;
    const mili_abmil_config *c = (const mili_abmil_config *)config;
    m->embed = mil_declare_patch_mlp(b, c->in_dim, c->embed_dim, c->num_fc_layers, c->dropout, "patch_embed");
    m->scorer = mil_declare_attention_scorer(b, c->embed_dim, c->attn_dim, 1, c->gate, c->dropout, "global_attn");
    if (c->num_classes > 0) m->classifier = mil_declare_linear(b, c->embed_dim, c->num_classes, 1, MIL_LINEAR_KAIMING, "classifier");
}

MILI_FN void mili_abmil_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_abmil *m = (const mili_abmil *)model;
    const mili_abmil_config *c = (const mili_abmil_config *)config;
    mil_node *mask = mili_mask_column(in->mask);
    mil_node *h = mil_patch_mlp_forward(&m->embed, mili_mask_features(in->features, mask));    // [B, N, E]
    mil_node *a = mil_attention_scores(&m->scorer, h);                                         // [B, N, 1]
    mil_node *pooled = mili_mask_scores(a, mask);
    mil_node *z = mil_softmax_pool(pooled, h);                                                 // [B, 1, E]: one attention map, K = 1

    mil_node *raw = mask ? mil_mask_fill(a, mask, -(double)MILI_REAL_MAX) : a;                 // as they are reported
    out->attention = mil_transpose(raw);                                                       // [B, 1, N]
    mili_report_attention(out, raw, pooled, h, c->num_classes ? &m->classifier : NULL);
    out->slide_feats = mil_squeeze(z, 1);                                                      // [B, E]
    if (c->num_classes == 0) return;
    out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                        // [B, C]
    out->loss = mili_bag_loss(in, out->logits);
}

// ---- abmil.torchmil: the same pooling over raw instances, binary, as torchmil has it --------------------------------
//   x_n <- feat_ext(x_n)      a_n = w . act(V x_n + b) [* sigmoid(U x_n + c)]      z = sum_n softmax(a)_n x_n      logit = v . z + d
#define MILI_ABMIL_TORCHMIL_OPTIONS(X, T)                                                                                          \
    X(T, INT,    in_dim,               "1024",  "1..1000000",     "width of an instance")                                          \
    X(T, INT,    att_dim,              "128",   "1..1000000",     "width A inside the attention")                                  \
    X(T, CHOICE, att_act,              "tanh",  "tanh|relu|gelu", "activation of the attention")                                   \
    X(T, BOOL,   gated,                "false", NULL,             "gated attention")                                               \
    X(T, INTS,   feat_ext_sizes,       "null",  "1..1000000",     "widths of an MLP before the attention")                         \
    X(T, TEXTS,  feat_ext_activations, "null",  NULL,             "its activations: a name with relu, sigmoid or tanh; else none")

MILI_CONFIG(mili_abmil_torchmil, MILI_ABMIL_TORCHMIL_OPTIONS);
static const mil_config mili_torchmil_configs[] = { { "torchmil", "" } };

typedef struct mili_abmil_torchmil { mil_mlp feat_ext; mil_attention_scorer pool; mil_linear_layer classifier; } mili_abmil_torchmil;

MILI_FN void mili_abmil_torchmil_declare(mil_builder *b, void *model, const void *config)
{
    static const mil_activation acts[3] = { MIL_ACT_TANH, MIL_ACT_RELU, MIL_ACT_GELU };
    mili_abmil_torchmil *m = (mili_abmil_torchmil *)model;
    const mili_abmil_torchmil_config *c = (const mili_abmil_torchmil_config *)config;
    const int64_t D = mil_declare_mlp(b, c->in_dim, &c->feat_ext_sizes, &c->feat_ext_activations, &m->feat_ext, "feat_ext.net");
    m->pool = mil_declare_attention_pool(b, D, c->att_dim, acts[c->att_act], c->gated, "pool");
    m->classifier = mil_declare_linear(b, D, 1, 1, MIL_LINEAR_TORCH, "classifier.module");
}

MILI_FN void mili_abmil_torchmil_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_abmil_torchmil *m = (const mili_abmil_torchmil *)model;
    MILI_UNUSED(config);
    mil_node *mask = mili_mask_column(in->mask);
    mil_node *x = mil_mlp_forward(&m->feat_ext, mili_mask_features(in->features, mask));       // [B, N, D]
    mil_node *f = mil_attention_scores(&m->pool, x);                                           // [B, N, 1]
    mil_node *a = mask ? mil_mask_fill(f, mask, -(double)MILI_INF) : f;
    mil_node *z = mil_softmax_pool(a, x);                                                      // [B, 1, D]

    // The reference reports the scores of padding as it finds it.
    mil_node *raw = mask ? mil_attention_scores(&m->pool, mil_mlp_forward(&m->feat_ext, in->features)) : f;
    out->attention = mil_squeeze(raw, 2);                                                      // [B, N]
    mili_report_attention(out, mask ? mil_mask_fill(f, mask, -(double)MILI_REAL_MAX) : f, a, x, &m->classifier);
    out->slide_feats = mil_squeeze(z, 1);                                                      // [B, D]
    out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                        // [B, 1]
    out->loss = mili_bag_loss(in, out->logits);
    mil_output(out, "loss.BCEWithLogitsLoss", out->loss);
}

// ---- dsmil: max over instances beside attention to the critical ones (Li, Li, Eliceiri, CVPR 2021), as MIL-Lab has it --
//   h_n = embed(x_n)                 s_nc = inst_classifier(h_n)        j_c = argmax_n s_nc: the critical instance of class c
//   a_nc = <q(h_n), q(h_{j_c})>      P = softmax_n(a / sqrt A)          F_c = LN(sum_n P_nc v(h_n))
//   bag_c = b_c + sum_{c',e} W[c,c',e] F_{c'e}                          logits = (bag + max_n s_n) / 2
// Two products over all instances are not made: with q(h) = W h + b the scores are h . (W^T q_c) + b . q_c, and as P sums to
// 1 the weighted mean of the values is v(sum_n P_nc h_n).
#define MILI_DSMIL_OPTIONS(X, T)                                                                                        \
    X(T, INT,  in_dim,        "1024",  "1..1000000", "width D of an instance")                                          \
    X(T, INT,  num_classes,   "2",     "1..1000000", "classes C")                                                       \
    X(T, INT,  embed_dim,     "512",   "1..1000000", "width E of an embedded instance")                                 \
    X(T, INT,  num_fc_layers, "1",     "1..16",      "layers of the patch MLP")                                         \
    X(T, REAL, dropout,       "0.25",  "0..1",       "rate between the MLP's layers")                                   \
    X(T, INT,  attn_dim,      "384",   "1..1000000", "width A of the queries")                                          \
    X(T, REAL, dropout_v,     "0.0",   "0..1",       "rate before the value layer")                                     \
    X(T, BOOL, mask_critical, "false", NULL,         "ours: a masked instance is never critical; in MIL-Lab it can be")

MILI_CONFIG(mili_dsmil, MILI_DSMIL_OPTIONS);

typedef struct mili_dsmil { mil_patch_mlp embed; mil_linear_layer inst_classifier, q, v, classifier; mil_norm_layer norm; } mili_dsmil;

// A 1-d convolution as wide as its input [in, width], that is a linear layer over it. Weight [out, in, width]; torch's own start.
MILI_FN mil_linear_layer mili_declare_conv1d(mil_builder *b, int64_t in, int64_t out, int64_t width, const char *key)
{
    mil_linear_layer layer;
    const mil_init init = { MIL_INIT_UNIFORM, 1 / sqrt((double)in * (double)width) };
    const int64_t shape[3] = { out, in, width };
    layer.weight = mil_declare(b, init, 3, shape, "%s.weight", key);
    layer.bias = mil_declare(b, init, 1, &out, "%s.bias", key);
    return layer;
}

MILI_FN void mili_dsmil_declare(mil_builder *b, void *model, const void *config)
{
    mili_dsmil *m = (mili_dsmil *)model;
    const mili_dsmil_config *c = (const mili_dsmil_config *)config;
    const int64_t E = c->embed_dim, C = c->num_classes;
    m->embed = mil_declare_patch_mlp(b, c->in_dim, E, c->num_fc_layers, c->dropout, "patch_embed");
    m->inst_classifier = mil_declare_linear(b, E, C, 1, MIL_LINEAR_KAIMING, "i_classifier.inst_classifier");
    m->q = mil_declare_linear(b, E, c->attn_dim, 1, MIL_LINEAR_KAIMING, "b_classifier.q");
    m->v = mil_declare_linear(b, E, E, 1, MIL_LINEAR_KAIMING, "b_classifier.v.1");
    m->norm = mil_declare_layer_norm(b, E, 1e-5, "b_classifier.norm");
    mili_declare_conv1d(b, 3, 3, E, "b_classifier.fcc");                                       // in checkpoints, not in the equations
    m->classifier = mili_declare_conv1d(b, C, C, E, "classifier");
}

MILI_FN void mili_dsmil_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_dsmil *m = (const mili_dsmil *)model;
    const mili_dsmil_config *c = (const mili_dsmil_config *)config;
    mil_node *mask = mili_mask_column(in->mask);
    mil_node *h = mil_patch_mlp_forward(&m->embed, c->mask_critical ? mili_mask_features(in->features, mask) : in->features);
    mil_node *s = mil_linear_forward(&m->inst_classifier, h);                                  // [B, N, C], h is [B, N, E]
    mil_node *ranked = mask && c->mask_critical ? mil_mask_fill(s, mili_mask_real(mask), -(double)MILI_REAL_MAX) : s;
    mil_node *q = mil_linear_forward(&m->q, mili_gather_bags(h, mil_argmax(ranked, 1)));       // [B, C, A]  q(h_{j_c})

    mil_node *u = mil_matmul(q, mil_use(in->tape, m->q.weight));                               // [B, C, E]  W^T q_c
    mil_node *bq = mil_transpose(mil_sum(mil_mul(q, mil_use(in->tape, m->q.bias)), -1));       // [B, 1, C]  b . q_c
    mil_node *a = mil_add(mil_matmul_t(h, u, 0, 1), bq);                                       // [B, N, C]
    a = mil_affine(a, 1 / sqrt((double)c->attn_dim), 0);
    mil_node *pooled = mili_mask_scores(a, mask);
    mil_node *z = mil_softmax_pool(pooled, mil_dropout(h, c->dropout_v, "v"));                 // [B, C, E]  sum_n P_nc h_n
    mil_node *F = mil_layer_norm_forward(&m->norm, mil_linear_forward(&m->v, z));              // [B, C, E]

    const int64_t flat[2] = { -1, c->num_classes * c->embed_dim };                             // the convolution as a matrix
    mil_node *W = mil_reshape(mil_use(in->tape, m->classifier.weight), 2, flat);               // [C, C E]
    mil_node *bag = mil_linear(mil_reshape(F, 2, flat), W, mil_use(in->tape, m->classifier.bias));     // [B, C]
    mili_report_attention(out, mask ? mil_mask_fill(a, mask, -(double)MILI_REAL_MAX) : a, pooled, h, NULL);
    out->attention = out->attention_weights;                                                   // [B, N, C]
    out->slide_feats = F;
    mil_output(out, "instance_logits", s);
    mil_output(out, "bag_logits", bag);
    out->logits = mil_affine(mil_add(bag, mil_squeeze(mil_max(ranked, 1), 1)), 0.5, 0);        // [B, C]
    out->loss = mili_bag_loss(in, out->logits);
}

// ---- wikg: a learned graph of patches (Li, Chen, Chu, Sun, Guan, Han, He, CVPR 2024), as MIL-Lab has it ----------------
//   h = relu(W x + b), h <- (h + mean_n h) / 2       e = W_head h, t = W_tail h
//   neighbours of i: the k largest <e_i, t_j>        p_ij = softmax_j(<e_i, t_j> / sqrt E)      g_ij = tanh(e_i + p_ij t_j)
//   q_i = softmax_j <g_ij, t_j>                      n_i = sum_j q_ij t_j                       u_i = aggregate(e_i, n_i): agg_type
//   z = LN(mean or max of the u_i, or sum_i softmax_i(gate_2 lrelu(gate_0 u_i)) u_i)           logits = C z + c
// No N x N matrix is made: the k neighbours of each row are found by tiles. The report `attention` [B, N, N] holds p at the
// neighbours and is built from them only when it is kept.
enum { MILI_WIKG_GCN, MILI_WIKG_SAGE, MILI_WIKG_BI };                              // agg_type
enum { MILI_WIKG_MEAN, MILI_WIKG_MAX, MILI_WIKG_ATTN };                            // pool

#define MILI_WIKG_OPTIONS(X, T)                                                                                                         \
    X(T, INT,    in_dim,      "1024",           "1..1000000",              "width D of an instance")                                    \
    X(T, INT,    num_classes, "2",              "1..1000000",              "classes C")                                                 \
    X(T, INT,    embed_dim,   "512",            "2..1000000",              "width E of an embedded instance")                           \
    X(T, INT,    topk,        "4",              "1..1000000",              "neighbours k of each patch, at most N")                     \
    X(T, CHOICE, agg_type,    "bi-interaction", "gcn|sage|bi-interaction", "u = act(L(e+n)); act(L[e,n]); act(L1(e+n)) + act(L2(e*n))") \
    X(T, CHOICE, pool,        "attn",           "mean|max|attn",           "over patches")                                              \
    X(T, REAL,   dropout,     "0.25",           "0..1",                    "rate before pooling")                                       \
    X(T, CHOICE, act,         "leaky_relu",     "leaky_relu|relu|tanh",    "activation of the aggregation")

MILI_CONFIG(mili_wikg, MILI_WIKG_OPTIONS);

typedef struct mili_wikg { mil_linear_layer embed, head, tail, linear1, linear2, gate0, gate2, classifier; mil_norm_layer norm; } mili_wikg;

MILI_FN void mili_wikg_declare(mil_builder *b, void *model, const void *config)
{
    mili_wikg *m = (mili_wikg *)model;
    const mili_wikg_config *c = (const mili_wikg_config *)config;
    const int64_t E = c->embed_dim, half = E / 2;
    const int bi = c->agg_type == MILI_WIKG_BI;
    m->embed = mil_declare_linear(b, c->in_dim, E, 1, MIL_LINEAR_KAIMING, "patch_embed.0");
    m->head = mil_declare_linear(b, E, E, 1, MIL_LINEAR_KAIMING, "W_head");
    m->tail = mil_declare_linear(b, E, E, 1, MIL_LINEAR_KAIMING, "W_tail");
    mil_declare_linear(b, E, half, 1, MIL_LINEAR_KAIMING, "gate_U");                           // these three: in checkpoints, not in
    mil_declare_linear(b, E, half, 1, MIL_LINEAR_KAIMING, "gate_V");                           // the equations
    mil_declare_linear(b, half, E, 1, MIL_LINEAR_KAIMING, "gate_W");
    m->linear1 = mil_declare_linear(b, c->agg_type == MILI_WIKG_SAGE ? 2 * E : E, E, 1, MIL_LINEAR_KAIMING, bi ? "linear1" : "linear");
    if (bi) m->linear2 = mil_declare_linear(b, E, E, 1, MIL_LINEAR_KAIMING, "linear2");
    if (c->pool == MILI_WIKG_ATTN) {
        m->gate0 = mil_declare_linear(b, E, half, 1, MIL_LINEAR_KAIMING, "readout.gate_nn.0");
        m->gate2 = mil_declare_linear(b, half, 1, 1, MIL_LINEAR_KAIMING, "readout.gate_nn.2");
    }
    m->norm = mil_declare_layer_norm(b, E, 1e-5, "norm");
    m->classifier = mil_declare_linear(b, E, c->num_classes, 1, MIL_LINEAR_KAIMING, "classifier");
}

// Column j of x [B, N, k], as [B, N, 1].
MILI_FN mil_node *mili_column(mil_node *x, int64_t j) { return mil_slice(x, -1, j, 1); }

// softmax over j of scale <y_j, t_j>: [B, N, k].  y_j = e, or tanh(e + p_j t_j) when p [B, N, k] is given; t[j] [B, N, E]
MILI_FN mil_node *mili_wikg_weights(mil_node *e, mil_node *const *t, mil_node *p, int64_t k, double scale, mil_node **score)
{
    for (int64_t j = 0; j < k; j++) {
        mil_node *y = p ? mil_tanh(mil_add(e, mil_mul(t[j], mili_column(p, j)))) : e;
        score[j] = mil_affine(mil_sum(mil_mul(y, t[j]), -1), scale, 0);
    }
    return mil_softmax(mil_concat(score, (int)k, -1), -1);
}

MILI_FN void mili_wikg_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_wikg *m = (const mili_wikg *)model;
    const mili_wikg_config *c = (const mili_wikg_config *)config;
    const int64_t k = c->topk, N = in->features->shape[1];
    const mil_activation acts[3] = { MIL_ACT_LEAKY_RELU, MIL_ACT_RELU, MIL_ACT_TANH }, act = acts[c->act];
    if (k > N) {
        mil_tape_fail(in->tape, MIL_ERROR_ARGUMENT, "topk is %lld, the bag has %lld instances", (long long)k, (long long)N);
        return;
    }
    mil_node **t = (mil_node **)mili_tape_array(in->tape, k, sizeof *t);                       // t[j]: of the j-th neighbours
    mil_node **score = (mil_node **)mili_tape_array(in->tape, k, sizeof *score);
    if (!t || !score) return;

    mil_node *h = mil_relu(mil_linear_forward(&m->embed, in->features));                       // [B, N, E]
    h = mil_affine(mil_add(h, mil_mean(h, 1)), 0.5, 0);
    mil_node *e = mil_linear_forward(&m->head, h), *tail = mil_linear_forward(&m->tail, h);    // [B, N, E]
    mil_node *nearest = mil_nearest(e, tail, k);                                               // [B, N, k] indices
    for (int64_t j = 0; j < k; j++) t[j] = mil_gather_rows(tail, mili_column(nearest, j));     // [B, N, E]
    mil_node *p = mili_wikg_weights(e, t, NULL, k, 1 / sqrt((double)c->embed_dim), score);     // [B, N, k]
    mil_node *q = mili_wikg_weights(e, t, p, k, 1, score);                                     // [B, N, k]
    mil_node *n = mil_mul(t[0], mili_column(q, 0));                                            // [B, N, E]
    for (int64_t j = 1; j < k; j++) n = mil_add(n, mil_mul(t[j], mili_column(q, j)));

    mil_node *pair[2] = { e, n }, *mixed = c->agg_type == MILI_WIKG_SAGE ? mil_concat(pair, 2, -1) : mil_add(e, n);
    mil_node *u = mil_activate(mil_linear_forward(&m->linear1, mixed), act);                   // [B, N, E]
    if (c->agg_type == MILI_WIKG_BI) u = mil_add(u, mil_activate(mil_linear_forward(&m->linear2, mil_mul(e, n)), act));
    u = mil_dropout(u, c->dropout, "message");

    mil_node *z;                                                                               // [B, 1, E]
    if (c->pool == MILI_WIKG_ATTN) {
        mil_node *a = mil_linear_forward(&m->gate2, mil_leaky_relu(mil_linear_forward(&m->gate0, u), 0.01));
        z = mil_softmax_pool(a, u);
        mili_report_attention(out, a, a, u, NULL);                                             // a [B, N, 1]
    } else z = c->pool == MILI_WIKG_MEAN ? mil_mean(u, 1) : mil_max(u, 1);
    out->slide_feats = mil_layer_norm_forward(&m->norm, mil_squeeze(z, 1));                    // [B, E]
    out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                        // [B, C]
    out->loss = mili_bag_loss(in, out->logits);

    p = mil_detach(p);
    for (int64_t j = 0; j < k; j++) {                                                          // [B, N, N], k entries a row
        mil_node *hot = mil_mul(mil_one_hot(mil_squeeze(mili_column(nearest, j), 2), N), mili_column(p, j));
        out->attention = j ? mil_add(out->attention, hot) : hot;
    }
}

// ---- clam: attention pooling with an instance loss (Lu et al., Nature Biomedical Engineering 2021), as MIL-Lab has it ---
//   h_n = embed(x_n)      a_n = scorer(h_n)      z = sum_n softmax(a)_n h_n      logits = C z + c
//   The k instances of most attention should look like the bag's class y to instance classifier y, the k of least should not;
//   with subtyping, the k of most attention should not look like the other classes to theirs:
//   instance_loss = l_y, or sum_c l_c / C      loss = w cls_loss + (1 - w) instance_loss
enum { MILI_CLAM_SVM, MILI_CLAM_CE };                                              // instance_loss_fn

#define MILI_CLAM_OPTIONS(X, T)                                                                                \
    X(T, INT,    in_dim,           "1024",  "1..1000000", "width D of an instance")                            \
    X(T, INT,    num_classes,      "2",     "1..1000000", "classes C")                                         \
    X(T, INT,    embed_dim,        "512",   "1..1000000", "width E of an embedded instance")                   \
    X(T, INT,    n_fc_layers,      "1",     "1..16",      "layers of the patch MLP")                           \
    X(T, REAL,   dropout,          "0.25",  "0..1",       "rate between the MLP's layers and in the scorer")   \
    X(T, BOOL,   gate,             "true",  NULL,         "gated attention or plain")                          \
    X(T, INT,    attention_dim,    "384",   "1..1000000", "width A inside the attention scorer")               \
    X(T, INT,    k_sample,         "8",     "1..1000000", "instances k from each end, at most N")              \
    X(T, BOOL,   subtyping,        "false", NULL,         "the other classes' instance classifiers learn too") \
    X(T, CHOICE, instance_loss_fn, "svm",   "svm|ce",     "smooth top-1 SVM loss or cross-entropy")            \
    X(T, REAL,   bag_weight,       "0.7",   "0..1",       "weight w of the bag's loss")

MILI_CONFIG(mili_clam, MILI_CLAM_OPTIONS);
static const mil_config mili_clam_configs[] = {
    { "base", "" }, { "base_ce", "instance_loss_fn=ce" }, { "base_subtyping", "subtyping=true" },
    { "base_ce_subtyping", "instance_loss_fn=ce subtyping=true" }
};

typedef struct mili_clam { mil_patch_mlp embed; mil_attention_scorer scorer; mil_linear_layer classifier, *instance; } mili_clam;

MILI_FN void mili_clam_declare(mil_builder *b, void *model, const void *config)
{
    mili_clam *m = (mili_clam *)model;
    const mili_clam_config *c = (const mili_clam_config *)config;
    m->embed = mil_declare_patch_mlp(b, c->in_dim, c->embed_dim, c->n_fc_layers, c->dropout, "patch_embed");
    m->scorer = mil_declare_attention_scorer(b, c->embed_dim, c->attention_dim, 1, c->gate, c->dropout, "global_attn");
    m->classifier = mil_declare_linear(b, c->embed_dim, c->num_classes, 1, MIL_LINEAR_KAIMING, "classifier");
    m->instance = (mil_linear_layer *)mili_declare_array(b, c->num_classes, sizeof *m->instance);
    for (int64_t i = 0; m->instance && i < c->num_classes; i++)
        m->instance[i] = mil_declare_linear(b, c->embed_dim, 2, 1, MIL_LINEAR_KAIMING, "instance_classifiers.%lld", (long long)i);
    if (c->instance_loss_fn == MILI_CLAM_SVM) {
        const mil_init range = { MIL_INIT_RANGE, 0 };
        const int64_t two = 2;
        mil_declare_buffer(b, MIL_I64, range, 1, &two, "instance_loss_fn.labels");             // [0, 1], as the reference saves it
    }
}

#ifndef MIL_NO_TRAINING
// What instance classifier c should say of rows [1, R, E]: 1 for the first `ones` of them, 0 for the others.
MILI_FN mil_node *mili_clam_instance_loss(const mili_clam *m, const mili_clam_config *c, int64_t which, mil_node *rows, int64_t ones)
{
    if (!rows) return NULL;
    int64_t count = rows->shape[1];
    int64_t *label = (int64_t *)mili_tape_array(rows->tape, count, sizeof *label);
    if (!label) return NULL;
    for (int64_t i = 0; i < count; i++) label[i] = i < ones;
    const mil_tensor tensor = mil_tensor_make(label, MIL_I64, 1, &count);
    mil_node *labels = mil_input(rows->tape, "instance labels", &tensor);
    mil_node *scores = mil_squeeze(mil_linear_forward(&m->instance[which], rows), 0);          // [R, 2]
    return c->instance_loss_fn == MILI_CLAM_SVM ? mil_smooth_svm(scores, labels, 1, 1) : mil_cross_entropy(scores, labels, NULL, 0);
}

// h [1, N, E], a [1, N, 1]. The choice by attention carries no gradient, the chosen rows do.
MILI_FN void mili_clam_losses(const mili_clam *m, const mili_clam_config *c, const mil_inputs *in, mil_node *h, mil_node *a, mil_outputs *out)
{
    mil_node *cls = mil_loss_node(out->logits, in->target);    // which checks the target
    if (!cls) return;
    const int64_t k = c->k_sample, N = in->features->shape[1], y = mili_target_label(in->target);
    if (k > N || y < 0 || y >= c->num_classes) {
        if (k > N)
            mil_tape_fail(in->tape, MIL_ERROR_ARGUMENT,
                          "k_sample is %lld, the bag has %lld instance%s; create the model with a smaller k_sample, or leave such bags out",
                          (long long)k, (long long)N, N == 1 ? "" : "s");
        else
            mil_tape_fail(in->tape, MIL_ERROR_ARGUMENT, "label %lld is not one of the classes 0..%lld", (long long)y,
                          (long long)(c->num_classes - 1));
        return;
    }
    mil_node *ends[2] = { mil_topk(a, k, 1, 1), mil_topk(a, k, 1, 0) }, *sum = NULL;           // [1, k, 1] of most attention, of least
    mil_node *rows = mil_gather_rows(h, mil_concat(ends, 2, 1));                               // [1, 2 k, E]
    for (int64_t i = 0; i < c->num_classes; i++) {
        if (i != y && !c->subtyping) continue;
        mil_node *loss = mili_clam_instance_loss(m, c, i, i == y ? rows : mil_slice(rows, 1, 0, k), i == y ? k : 0);
        sum = sum ? mil_add(sum, loss) : loss;
    }
    if (c->subtyping) sum = mil_affine(sum, 1 / (double)c->num_classes, 0);
    mili_two_losses(out, cls, sum, c->bag_weight);
}
#endif

MILI_FN void mili_clam_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_clam *m = (const mili_clam *)model;
    const mili_clam_config *c = (const mili_clam_config *)config;
    mil_node *h = mil_patch_mlp_forward(&m->embed, in->features);                              // [1, N, E]
    mil_node *a = mil_attention_scores(&m->scorer, h);                                         // [1, N, 1]
    out->attention = mil_squeeze(a, 2);                                                        // [1, N]
    mili_report_attention(out, a, a, h, &m->classifier);
    out->slide_feats = mil_squeeze(mil_softmax_pool(a, h), 1);                                 // [1, E]
    out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                        // [1, C]
    mil_output(out, "instance_feats", mil_squeeze(h, 0));                                      // [N, E]
#ifndef MIL_NO_TRAINING
    if (in->target && out->logits) mili_clam_losses(m, c, in, h, a, out);
#else
    MILI_UNUSED(c);
#endif
}

// ---- dftd: two tiers of attention over random pseudo bags (Zhang et al.: DTFD-MIL, CVPR 2022), as MIL-Lab has it -------
//   f_n = residual MLP(x_n)      a_n = scorer_1(f_n)      b_g = sum of a_n f_n over pseudo bag g      sub_g = C_1 b_g + c_1
//   P = rows distilled from the pseudo bags               alpha = scorer_2(P)       logits = C_2 sum alpha_p P_p + c_2
// Neither attention has a softmax in MIL-Lab; paper_attention gives the paper's. Distilling by MaxS or MaxMinS sorts each
// pseudo bag by r_n = softmax(C_1 a_n f_n)[C - 1] and keeps the k first (and the k last); AFS keeps b_g. With k = 0, MIL-Lab's
// own defaults, MaxMinS keeps every row and MaxS none. instance_loss: mean loss of the sub_g; loss = w cls_loss + (1 - w) instance_loss.
enum { MILI_DFTD_MAXMINS, MILI_DFTD_MAXS, MILI_DFTD_AFS };                         // distill

#define MILI_DFTD_OPTIONS(X, T)                                                                                         \
    X(T, INT,    in_dim,          "1024",    "1..1000000",       "width D of an instance")                              \
    X(T, INT,    num_classes,     "2",       "1..1000000",       "classes C")                                           \
    X(T, INT,    embed_dim,       "512",     "1..1000000",       "width E of an embedded instance")                     \
    X(T, INT,    attention_dim,   "128",     "1..1000000",       "width A inside both scorers")                         \
    X(T, INT,    num_residuals,   "4",       "0..1000",          "residual blocks after the first layer")               \
    X(T, INT,    num_group,       "8",       "1..1000000",       "pseudo bags G")                                       \
    X(T, INT,    total_instance,  "4",       "0..1000000",       "k = total_instance / num_group, rounded down")        \
    X(T, CHOICE, distill,         "MaxMinS", "MaxMinS|MaxS|AFS", "what a pseudo bag hands to the second tier")          \
    X(T, REAL,   bag_weight,      "0.7",     "0..1",             "weight w of the second tier's loss")                  \
    X(T, REAL,   dropout,         "0.25",    "0..1",             "rate before the first tier's classifier")             \
    X(T, REAL,   attention_drop,  "0.25",    "0..1",             "rate in the first tier's scorer")                     \
    X(T, INT,    num_fc_layers,   "1",       NULL,               "without effect, as in MIL-Lab")                       \
    X(T, BOOL,   paper_attention, "false",   NULL,               "ours: a softmax in both attentions, as in the paper")

MILI_CONFIG(mili_dftd, MILI_DFTD_OPTIONS);
static const mil_config mili_dftd_configs[] = { { "base", "" }, { "base_afs", "distill=AFS bag_weight=0.5" } };

typedef struct mili_dftd_block { mil_linear_layer first, second; } mili_dftd_block;
typedef struct mili_dftd {
    mil_linear_layer embed, classifier1, classifier2;
    mili_dftd_block *block;
    mil_attention_scorer scorer1, scorer2;
} mili_dftd;

MILI_FN void mili_dftd_declare(mil_builder *b, void *model, const void *config)
{
    mili_dftd *m = (mili_dftd *)model;
    const mili_dftd_config *c = (const mili_dftd_config *)config;
    const int64_t E = c->embed_dim;
    m->embed = mil_declare_linear(b, c->in_dim, E, 1, MIL_LINEAR_KAIMING, "patch_embed.fc1.0");
    m->block = (mili_dftd_block *)mili_declare_array(b, c->num_residuals, sizeof *m->block);
    for (int64_t r = 0; m->block && r < c->num_residuals; r++) {
        m->block[r].first = mil_declare_linear(b, E, E, 0, MIL_LINEAR_KAIMING, "patch_embed.resBlocks.%lld.block.0", (long long)r);
        m->block[r].second = mil_declare_linear(b, E, E, 0, MIL_LINEAR_KAIMING, "patch_embed.resBlocks.%lld.block.2", (long long)r);
    }
    m->scorer1 = mil_declare_attention_scorer(b, E, c->attention_dim, 1, 1, c->attention_drop, "attention");
    m->classifier1 = mil_declare_linear(b, E, c->num_classes, 1, MIL_LINEAR_KAIMING, "classifier.fc");
    mil_declare_alias(b, m->classifier1.weight, "classifier.weight");                          // after MIL-Lab adapts a checkpoint
    mil_declare_alias(b, m->classifier1.bias, "classifier.bias");
    m->scorer2 = mil_declare_attention_scorer(b, E, c->attention_dim, 1, 1, 0, "attCls.global_attn");
    m->classifier2 = mil_declare_linear(b, E, c->num_classes, 1, MIL_LINEAR_KAIMING, "attCls.classifier.fc");
}

// Pseudo bags are consecutive runs of the shuffled instances; the first N mod G are one longer, the last are empty when N < G.
// run [N]: the group of each place. keep: the places kept, the `first` and the `last` of each run (all of a shorter one).
typedef struct mili_dftd_groups { mil_node *run, *keep; int64_t kept; } mili_dftd_groups;

MILI_FN mili_dftd_groups mili_dftd_split(mil_tape *tape, int64_t N, int64_t G, int64_t first, int64_t last)
{
    mili_dftd_groups g;
    memset(&g, 0, sizeof g);
    const int64_t longest = (N + G - 1) / G, most = MILI_MIN(first, longest) + MILI_MIN(last, longest), groups = MILI_MIN(G, N);
    int64_t *run = (int64_t *)mili_tape_array(tape, N, sizeof *run);
    int64_t *keep = (int64_t *)mili_tape_array(tape, MILI_MAX(groups * most, 1), sizeof *keep);
    if (!run || !keep) return g;
    for (int64_t i = 0, at = 0; i < groups; i++) {
        const int64_t length = N / G + (i < N % G), head = MILI_MIN(first, length), foot = MILI_MIN(last, length);
        for (int64_t j = 0; j < length; j++) run[at + j] = i;
        for (int64_t j = 0; j < head; j++) keep[g.kept++] = at + j;
        for (int64_t j = length - foot; j < length; j++) keep[g.kept++] = at + j;
        at += length;
    }
    const mil_tensor places = mil_tensor_make(run, MIL_I64, 1, &N), kept = mil_tensor_make(keep, MIL_I64, 1, &g.kept);
    g.run = mil_input(tape, "pseudo bags", &places);
    g.keep = mil_input(tape, "kept", &kept);
    return g;
}

#ifndef MIL_NO_TRAINING
// The mean loss of sub [1, G, C], the bag's target for each pseudo bag. `cls` is the bag's loss, whose recording checked the target.
MILI_FN mil_node *mili_dftd_instance_loss(const mil_target *target, mil_node *sub, const mil_node *cls)
{
    if (!sub || !cls) return NULL;
    mil_tape *tape = sub->tape;
    const int64_t G = sub->shape[1], C = sub->shape[2];
    int64_t *labels = (int64_t *)mili_tape_array(tape, G, sizeof *labels);
    double *values = (double *)mili_tape_array(tape, G * C, sizeof *values);
    if (!labels || !values) return NULL;
    for (int64_t i = 0; i < G; i++) labels[i] = mili_target_label(target);
    for (int64_t i = 0; i < G * C; i++) values[i] = target->values ? target->values[i % C] : target->value;
    mil_target t = mil_target_class(0);
    t.loss = target->loss;
    t.labels = labels;
    t.values = values;
    t.count = target->loss == MIL_LOSS_CE ? G : G * C;
    return mil_loss_node(mil_squeeze(sub, 0), &t);
}
#endif

MILI_FN void mili_dftd_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_dftd *m = (const mili_dftd *)model;
    const mili_dftd_config *c = (const mili_dftd_config *)config;
    const int64_t N = in->features->shape[1], G = c->num_group, k = c->total_instance / G;
    const int afs = c->distill == MILI_DFTD_AFS, all = c->distill == MILI_DFTD_MAXMINS && k == 0;
    const mili_dftd_groups groups = mili_dftd_split(in->tape, N, G, afs ? 0 : all ? N : k, c->distill == MILI_DFTD_MAXMINS ? k : 0);
    mil_node *shuffle = mil_random_permutation(in->tape, "shuffle", N);                        // [N] instances by place

    mil_node *f = mil_relu(mil_linear_forward(&m->embed, in->features));                       // [1, N, E]
    for (int64_t r = 0; r < c->num_residuals; r++)
        f = mil_add(f, mil_relu(mil_linear_forward(&m->block[r].second, mil_relu(mil_linear_forward(&m->block[r].first, f)))));

    // First tier. member [1, N, G] has a one where instance n is in pseudo bag g, weight a_n there.
    const int64_t table[3] = { 1, N, G };
    mil_node *member = mil_reshape(mil_scatter_add(mil_one_hot(groups.run, G), shuffle, 0, N), 3, table);
    mil_node *a = mil_attention_scores(&m->scorer1, f), *weight = mil_mul(member, a);          // [1, N, 1], [1, N, G]
    if (c->paper_attention) {
        weight = mil_softmax(mil_mask_fill(mil_broadcast(a, 3, table), member, -(double)MILI_INF), 1);
        a = mil_sum(weight, -1);
    }
    mil_node *bags = mil_matmul_t(weight, f, 1, 0);                                            // [1, G, E]
    mil_node *sub = mil_linear_forward(&m->classifier1, mil_dropout(bags, c->dropout, "tier1"));           // [1, G, C]
    mil_output(out, "sub_logits", mil_squeeze(sub, 0));

    // Instances in the order of their pseudo bags, and in each by r: a sort by r, then a stable one by pseudo bag.
    mil_node *W = mil_detach(mil_use(in->tape, m->classifier1.weight));
    mil_node *p = mil_softmax(mil_mul(mil_detach(a), mil_linear(mil_detach(f), W, NULL)), -1); // [1, N, C]
    mil_node *r = mil_reshape(mil_slice(p, -1, c->num_classes - 1, 1), 1, &N);                 // [N]
    mil_node *by_r = mil_argsort(mil_gather(r, shuffle, 0), 0, 1);                             // [N] places
    mil_node *run = mil_affine(groups.run, 1, 0);                                              // [N] as mil_real: no indices to gather
    mil_node *by_bag = mil_argsort(mil_gather(run, by_r, 0), 0, 0);
    mil_node *order = mil_gather(shuffle, mil_gather(by_r, by_bag, 0), 0);                     // [N] instances
    mil_node *kept = all || afs ? order : mil_gather(order, groups.keep, 0);

    // Second tier, over the rows P [1, P, E]. When all are kept their order does not matter but to the report.
    if (afs || groups.kept) {
        mil_node *P = afs ? bags : all ? f : mil_gather(f, kept, 1);
        mil_node *alpha = mil_attention_scores(&m->scorer2, P);                                // [1, P, 1]
        if (c->paper_attention) alpha = mil_softmax(alpha, 1);
        mil_node *z = mil_squeeze(mil_matmul_t(alpha, P, 1, 0), 1);                            // [1, E]
        out->logits = mil_linear_forward(&m->classifier2, z);                                  // [1, C]
        out->attention = mil_squeeze(all ? mil_gather(alpha, order, 1) : alpha, 0);            // [P, 1]
        out->slide_feats = mil_squeeze(all ? mil_gather(f, order, 1) : P, 0);                  // [P, E]
        out->attention_scores = afs ? mil_mul(a, mil_matmul(member, alpha)) : all ? alpha : mil_scatter_add(alpha, kept, 1, N);
        out->contribution = mili_contribution(&m->classifier2, out->attention_scores, f);      // [1, N, C]
    } else {                                                                                   // MaxS with k = 0
        const int64_t shape[2] = { 1, c->num_classes };
        out->logits = mil_reshape(mil_use(in->tape, m->classifier2.bias), 2, shape);
    }
#ifndef MIL_NO_TRAINING
    if (!in->target || !out->logits) return;
    mil_node *cls = mil_loss_node(out->logits, in->target);
    mili_two_losses(out, cls, mili_dftd_instance_loss(in->target, sub, cls), c->bag_weight);
#endif
}

// ---- transmil: Nystrom attention, a class token, positions by convolution (Shao et al., NeurIPS 2021), as MIL-Lab has it ----
//   h = [cls | embed(x) | its first S^2 - N rows again],  S = ceil(sqrt N)
//   block i:  h <- h + nystrom_i(LN_i(h));   after block 0 the S^2 patch rows, as an S x S grid, go through PPEG
//   z = LN(h)[cls]      logits = W z + b
// attention_n = <h_n, h_cls> after block 0 and before PPEG: dot products, no softmax. Of the last block only the class token's row
// is used, so only that row is computed. Bags of a batch share the scale of the pseudo-inverse, as in MIL-Lab, so that they are
// not quite independent of each other.
#define MILI_TRANSMIL_OPTIONS(X, T)                                                                             \
    X(T, INT,  in_dim,               "1024", "1..1000000", "width D of an instance")                            \
    X(T, INT,  num_classes,          "2",    "1..1000000", "classes C")                                         \
    X(T, INT,  embed_dim,            "512",  "2..1000000", "width E of an embedded instance; E / 2 landmarks")  \
    X(T, INT,  num_fc_layers,        "1",    "1..16",      "layers of the patch MLP")                           \
    X(T, REAL, dropout,              "0.25", "0..1",       "rate between the MLP's layers")                     \
    X(T, INT,  num_attention_layers, "2",    "1..32",      "blocks")                                            \
    X(T, INT,  num_heads,            "4",    "1..1000000", "heads of width E / heads, rounded down")            \
    X(T, REAL, attn_dropout,         "0.1",  "0..1",       "ours: rate after each attention, fixed in MIL-Lab")

MILI_CONFIG(mili_transmil, MILI_TRANSMIL_OPTIONS);
typedef struct mili_transmil {
    mil_patch_mlp embed;
    mil_param *cls_token;                                  // [1, 1, E]
    mil_ppeg_layer pos_layer;
    mil_norm_layer norm, block_norm[MILI_MAX_BLOCKS];
    mil_nystrom_layer attention[MILI_MAX_BLOCKS];
    mil_linear_layer classifier;
} mili_transmil;

MILI_FN void mili_transmil_declare(mil_builder *b, void *model, const void *config)
{
    mili_transmil *m = (mili_transmil *)model;
    const mili_transmil_config *c = (const mili_transmil_config *)config;
    static const int64_t kernels[3] = { 7, 5, 3 };
    const int64_t E = c->embed_dim;
    mil_nystrom_options o = mil_nystrom_options_default(E, c->num_heads, E / c->num_heads, E / 2);
    o.dropout = c->attn_dropout;
    m->cls_token = mili_declare_token(b, MIL_INIT_NORMAL, 1, 1, E, "cls_token");
    m->embed = mil_declare_patch_mlp(b, c->in_dim, E, c->num_fc_layers, c->dropout, "patch_embed");
    m->pos_layer = mil_declare_ppeg(b, E, kernels, 3, MIL_LINEAR_XAVIER, "pos_layer");
    for (int64_t i = 0; i < c->num_attention_layers; i++) {
        m->block_norm[i] = mil_declare_layer_norm(b, E, 1e-5, "blocks.%lld.norm", (long long)i);
        m->attention[i] = mil_declare_nystrom(b, &o, "blocks.%lld.attention", (long long)i);
    }
    m->norm = mil_declare_layer_norm(b, E, 1e-5, "norm");
    m->classifier = mil_declare_linear(b, E, c->num_classes, 1, MIL_LINEAR_KAIMING, "classifier");
}

MILI_FN void mili_transmil_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_transmil *m = (const mili_transmil *)model;
    const mili_transmil_config *c = (const mili_transmil_config *)config;
    const int64_t B = in->features->shape[0], N = in->features->shape[1], S = mili_square_side(N);
    mil_node *part[2];
    part[0] = mili_tokens(in->tape, m->cls_token, B);                                          // [B, 1, E]
    part[1] = mili_wrap_rows(mil_patch_mlp_forward(&m->embed, in->features), S * S);           // [B, S^2, E]
    mil_node *h = mil_concat(part, 2, 1);                                                      // [B, 1 + S^2, E]

    for (int64_t i = 0; i < c->num_attention_layers; i++) {
        const int last = i + 1 == c->num_attention_layers;
        mili_push_block(in->tape, i);
        mil_node *x = mil_layer_norm_forward(&m->block_norm[i], h), *full = h;
        if (!last || i == 0) full = mil_add(h, mil_nystrom_forward(&m->attention[i], x, NULL, -1, NULL));
        if (i == 0) {
            mil_node *a = mil_matmul_t(full, mil_slice(full, 1, 0, 1), 0, 1);                  // [B, 1 + S^2, 1]  <h_n, h_cls>
            out->attention = mil_squeeze(mil_slice(a, 1, 1, S * S), 2);
            out->attention_scores = mil_slice(a, 1, 1, N);
            if (!last) full = mil_ppeg_forward(&m->pos_layer, full, 1, S);
        }
        h = last ? mil_add(mil_slice(h, 1, 0, 1), mil_nystrom_forward(&m->attention[i], x, NULL, 1, NULL)) : full;
        mil_tape_pop(in->tape);
    }
    out->slide_feats = mil_squeeze(mil_layer_norm_forward(&m->norm, h), 1);                    // [B, E]
    out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                        // [B, C]
    out->loss = mili_bag_loss(in, out->logits);
}

// ---- transformer: pre-norm encoder with a class token and exact attention (Vaswani et al., NeurIPS 2017), as MIL-Lab has it ----
//   X = [cls | embed(x)]
//   block:  X <- X + MHA(LN(X)),   X <- X + relu(W_3 relu(W_0 LN_2(X) + b_0) + b_3): a relu stands before the sum, too
//   z = LN(X)[cls]      logits = W z + b
// Of the last block only the class token's row is used, so its attention has a single query.
#define MILI_TRANSFORMER_OPTIONS(X, T)                                                                                  \
    X(T, INT,  in_dim,               "1024",  "1..1000000", "width D of an instance")                                   \
    X(T, INT,  num_classes,          "2",     "1..1000000", "classes C")                                                \
    X(T, INT,  embed_dim,            "512",   "1..1000000", "width E of an embedded instance, a multiple of the heads") \
    X(T, INT,  num_fc_layers,        "1",     "1..16",      "layers of the patch MLP")                                  \
    X(T, REAL, dropout,              "0.25",  "0..1",       "rate in the patch MLP, on attention, in the blocks' MLP")  \
    X(T, INT,  num_attention_layers, "2",     "1..32",      "blocks")                                                   \
    X(T, INT,  num_heads,            "8",     "1..1000000", "heads")                                                    \
    X(T, INT,  encoder_mlp_dim,      "-1",    "-1000000..1000000", "hidden width of the blocks' MLP; 0 or less: none")  \
    X(T, BOOL, return_attention,     "false", NULL,         "ours: MIL-Lab's changed result: block 0 adds the class token's attention to every row")

MILI_CONFIG(mili_transformer, MILI_TRANSFORMER_OPTIONS);
static const mil_config mili_transformer_configs[] = { { "base", "encoder_mlp_dim=2048" } };

typedef struct mili_transformer_block { mil_norm_layer norm, norm2; mil_mha_layer attention; mil_linear_layer up, down; } mili_transformer_block;
typedef struct mili_transformer {
    mil_patch_mlp embed;
    mil_param *cls_token;                                  // [1, 1, E]
    mili_transformer_block block[MILI_MAX_BLOCKS];
    mil_norm_layer norm;
    mil_linear_layer classifier;
} mili_transformer;

MILI_FN void mili_transformer_declare(mil_builder *b, void *model, const void *config)
{
    mili_transformer *m = (mili_transformer *)model;
    const mili_transformer_config *c = (const mili_transformer_config *)config;
    const int64_t E = c->embed_dim;
    m->cls_token = mili_declare_token(b, MIL_INIT_NORMAL, 1, 1, E, "cls_token");
    m->embed = mil_declare_patch_mlp(b, c->in_dim, E, c->num_fc_layers, c->dropout, "patch_embed");
    for (int64_t i = 0; i < c->num_attention_layers; i++) {
        mili_transformer_block *k = &m->block[i];
        k->norm = mil_declare_layer_norm(b, E, 1e-5, "blocks.%lld.norm", (long long)i);
        k->attention = mil_declare_mha(b, E, c->num_heads, c->dropout, MIL_LINEAR_KAIMING, "blocks.%lld.attention", (long long)i);
        if (c->encoder_mlp_dim <= 0) continue;
        k->norm2 = mil_declare_layer_norm(b, E, 1e-5, "blocks.%lld.norm2", (long long)i);
        k->up = mil_declare_linear(b, E, c->encoder_mlp_dim, 1, MIL_LINEAR_KAIMING, "blocks.%lld.mlp.0", (long long)i);
        k->down = mil_declare_linear(b, c->encoder_mlp_dim, E, 1, MIL_LINEAR_KAIMING, "blocks.%lld.mlp.3", (long long)i);
    }
    m->norm = mil_declare_layer_norm(b, E, 1e-5, "norm");
    m->classifier = mil_declare_linear(b, E, c->num_classes, 1, MIL_LINEAR_KAIMING, "classifier");
}

MILI_FN void mili_transformer_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_transformer *m = (const mili_transformer *)model;
    const mili_transformer_config *c = (const mili_transformer_config *)config;
    const int64_t N = in->features->shape[1];
    mil_node *part[2], *attention = NULL;
    part[0] = mili_tokens(in->tape, m->cls_token, in->features->shape[0]);                     // [B, 1, E]
    part[1] = mil_patch_mlp_forward(&m->embed, in->features);                                  // [B, N, E]
    mil_node *X = mil_concat(part, 2, 1);                                                      // [B, 1 + N, E]
    for (int64_t i = 0; i < c->num_attention_layers; i++) {
        const mili_transformer_block *k = &m->block[i];
        const int last = i + 1 == c->num_attention_layers;
        mili_push_block(in->tape, i);
        mil_node *x = mil_layer_norm_forward(&k->norm, X), *y = NULL;
        mil_node *first = mil_layer_norm_forward(&k->norm, mil_slice(X, 1, 0, 1));             // [B, 1, E] the class token
        if (i == 0 || !last) y = mil_mha_forward(&k->attention, x, x, x, NULL, i == 0 ? &attention : NULL);
        if (i == 0 && c->return_attention) y = mil_slice(y, 1, 0, 1);                          // added to every row
        else if (last) y = mil_mha_forward(&k->attention, first, x, x, NULL, NULL);
        X = mil_add(last ? mil_slice(X, 1, 0, 1) : X, y);
        if (c->encoder_mlp_dim > 0) {
            mil_node *h = mil_dropout(mil_relu(mil_linear_forward(&k->up, mil_layer_norm_forward(&k->norm2, X))), c->dropout, "mlp");
            X = mil_add(X, mil_relu(mil_linear_forward(&k->down, h)));
        }
        mil_tape_pop(in->tape);
    }
    out->attention = mil_attention_weights(attention, 0, N + 1);                               // [B, N + 1, N + 1], a report
    out->attention_weights = mil_transpose(mil_slice(mil_attention_weights(attention, 0, 1), 2, 1, N));      // [B, N, 1] of the class token
    out->slide_feats = mil_squeeze(mil_layer_norm_forward(&m->norm, X), 1);                    // [B, E]
    out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                        // [B, C]
    out->loss = mili_bag_loss(in, out->logits);
}

// ---- ilra: attention through a few learned latents and back (Xiang, Zhang, ICLR 2023), as MIL-Lab has it -----------------
//   MAB(Q, K):  q, k, v = fc_q(Q), fc_k(K), fc_v(K);   o = LN(q + MHA(q, k, v));   o <- LN(o + relu(fc_o(o)));
//               if gated  o <- o * silu(gate(Q))
//   block i:    H = MAB(latent_i, x),   x <- MAB(x, H)         (gated)
//   z, P = MAB(S, x): one learned query pools                  logits = W z + b
#define MILI_ILRA_OPTIONS(X, T)                                                                                           \
    X(T, INT,    in_dim,               "1024", "1..1000000",     "width D of an instance")                                \
    X(T, INT,    num_classes,          "2",    "1..1000000",     "classes C")                                             \
    X(T, INT,    embed_dim,            "256",  "1..1000000",     "width E, a multiple of the heads")                      \
    X(T, INT,    num_attention_layers, "2",    "1..32",          "blocks")                                                \
    X(T, INT,    num_heads,            "8",    "1..1000000",     "heads")                                                 \
    X(T, INT,    topk,                 "64",   "1..1000000",     "latents k of a block")                                  \
    X(T, BOOL,   ln,                   "true", NULL,             "layer norms (MIL-Lab's wrapper always has them)")       \
    X(T, CHOICE, mode,                 "classification", "classification", "MIL-Lab names a survival mode, but has none")

MILI_CONFIG(mili_ilra, MILI_ILRA_OPTIONS);

typedef struct mili_mab { mil_linear_layer q, k, v, o, gate; mil_norm_layer ln0, ln1; mil_mha_layer attention; int ln, gated; } mili_mab;
typedef struct mili_ilra {
    mil_param *latent[MILI_MAX_BLOCKS], *S;                // [1, k, E], [1, 1, E]
    mili_mab forward[MILI_MAX_BLOCKS], backward[MILI_MAX_BLOCKS], pooling;
    mil_linear_layer classifier;
} mili_ilra;

MILI_FN mili_mab mili_declare_mab(mil_builder *b, int64_t d_q, int64_t d_k, const mili_ilra_config *c, int gated, const char *key)
{
    mili_mab m;
    const int64_t E = c->embed_dim;
    memset(&m, 0, sizeof m);
    m.ln = c->ln;
    m.gated = gated;
    m.q = mil_declare_linear(b, d_q, E, 1, MIL_LINEAR_KAIMING, "%s.fc_q", key);
    m.k = mil_declare_linear(b, d_k, E, 1, MIL_LINEAR_KAIMING, "%s.fc_k", key);
    m.v = mil_declare_linear(b, d_k, E, 1, MIL_LINEAR_KAIMING, "%s.fc_v", key);
    m.attention = mil_declare_mha(b, E, c->num_heads, 0, MIL_LINEAR_KAIMING, "%s.multihead_attention", key);
    m.o = mil_declare_linear(b, E, E, 1, MIL_LINEAR_KAIMING, "%s.fc_o", key);
    if (c->ln) {
        m.ln0 = mil_declare_layer_norm(b, E, 1e-5, "%s.ln0", key);
        m.ln1 = mil_declare_layer_norm(b, E, 1e-5, "%s.ln1", key);
    }
    if (gated) m.gate = mil_declare_linear(b, d_q, E, 1, MIL_LINEAR_KAIMING, "%s.gate.0", key);
    return m;
}

// Q [B, n_q, d_q], K [B, n_k, d_k] -> [B, n_q, E]. The side with fewer rows (latents) comes first, so that the other, the instances,
// is computed tile by tile when it is needed instead of being stored.
MILI_FN mil_node *mili_mab_forward(const mili_mab *m, mil_node *Q, mil_node *K, mil_node **attention)
{
    if (Q && K && Q->shape[1] > K->shape[1]) Q = mili_after(Q, K);
    mil_node *q = mil_linear_forward(&m->q, Q);
    if (Q && K && Q->shape[1] <= K->shape[1]) K = mili_after(K, q);
    mil_node *o = mil_add(q, mil_mha_forward(&m->attention, q, mil_linear_forward(&m->k, K), mil_linear_forward(&m->v, K), NULL, attention));
    if (m->ln) o = mil_layer_norm_forward(&m->ln0, o);
    o = mil_add(o, mil_relu(mil_linear_forward(&m->o, o)));
    if (m->ln) o = mil_layer_norm_forward(&m->ln1, o);
    return m->gated ? mil_mul(o, mil_silu(mil_linear_forward(&m->gate, Q))) : o;
}

MILI_FN void mili_ilra_declare(mil_builder *b, void *model, const void *config)
{
    mili_ilra *m = (mili_ilra *)model;
    const mili_ilra_config *c = (const mili_ilra_config *)config;
    const int64_t E = c->embed_dim;
    char key[64];
    for (int64_t i = 0; i < c->num_attention_layers; i++) {
        const int64_t width = i ? E : c->in_dim;
        snprintf(key, sizeof key, "gab_blocks.%lld.latent", (long long)i);
        m->latent[i] = mili_declare_token(b, MIL_INIT_UNIFORM, sqrt(6.0 / ((double)E * (double)(c->topk + 1))), c->topk, E, key);
        snprintf(key, sizeof key, "gab_blocks.%lld.project_forward", (long long)i);
        m->forward[i] = mili_declare_mab(b, E, width, c, 1, key);
        snprintf(key, sizeof key, "gab_blocks.%lld.project_backward", (long long)i);
        m->backward[i] = mili_declare_mab(b, width, E, c, 1, key);
    }
    m->S = mili_declare_token(b, MIL_INIT_UNIFORM, sqrt(3.0 / (double)E), 1, E, "pooling.S");
    m->pooling = mili_declare_mab(b, E, E, c, 0, "pooling.mha");
    m->classifier = mil_declare_linear(b, E, c->num_classes, 1, MIL_LINEAR_KAIMING, "classifier");
}

MILI_FN void mili_ilra_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const mili_ilra *m = (const mili_ilra *)model;
    const mili_ilra_config *c = (const mili_ilra_config *)config;
    const int64_t B = in->features->shape[0];
    mil_node *x = in->features, *attention = NULL;                                             // [B, N, D]
    for (int64_t i = 0; i < c->num_attention_layers; i++) {
        mili_push_block(in->tape, i);
        mil_node *H = mili_mab_forward(&m->forward[i], mili_tokens(in->tape, m->latent[i], B), x, NULL);     // [B, k, E]
        x = mili_mab_forward(&m->backward[i], x, H, NULL);                                     // [B, N, E]
        mil_tape_pop(in->tape);
    }
    mil_node *z = mili_mab_forward(&m->pooling, mili_tokens(in->tape, m->S, B), x, &attention);              // [B, 1, E]
    mil_node *P = mil_attention_weights(attention, 0, 1);                                      // [B, 1, N]
    out->attention = mil_squeeze(mil_sum(P, 0), 0);                                            // [1, N]: MIL-Lab adds up the bags
    out->attention_weights = mil_transpose(P);                                                 // [B, N, 1]
    out->slide_feats = z;
    out->logits = mil_linear_forward(&m->classifier, mil_squeeze(z, 1));                       // [B, C]
    out->loss = mili_bag_loss(in, out->logits);
}

// ---- rrt: re-embedding by attention, then attention pooling (Tang et al., CVPR 2024), as MIL-Lab has it -------------------
//   x = act(W x + b)      layer:  x <- x + attn(LN(x)),   with ffn  x <- x + fc2(f(fc1(LN_2(x))))
//   z = sum_n softmax_n(scorer(LN(x)))_n LN(x)_n          logits = W z + b
// MIL-Lab always attends by Nystrom and never calls its position module. apply_attn and apply_pos wire up
// what the paper has: attention within square regions (R-MSA) with EPEG, and PPEG or PEG.
#define MILI_RRT_OPTIONS(X, T)                                                                                                          \
    X(T, INT,    in_dim,        "1024",   "1..1000000",     "width D of an instance")                                                   \
    X(T, INT,    num_classes,   "2",      "1..1000000",     "classes C")                                                                \
    X(T, INT,    embed_dim,     "512",    "1..1000000",     "width of an embedded instance")                                            \
    X(T, INT,    mlp_dim,       "512",    "1..1000000",     "width M that the layers take: equal to embed_dim")                         \
    X(T, CHOICE, act,           "relu",   "none|relu|gelu", "after the embedding")                                                      \
    X(T, REAL,   dropout,       "0.25",   "0..1",           "rate after the embedding")                                                 \
    X(T, INT,    n_layers,      "2",      "1..16",          "layers")                                                                   \
    X(T, INT,    n_heads,       "8",      "1..1000000",     "heads H")                                                                  \
    X(T, INT,    trans_dim,     "64",     "1..1000000",     "width d of a head; H d need not be M")                                     \
    X(T, INT,    num_landmarks, "256",    "1..1000000",     "ours: landmarks of Nystrom attention, fixed in MIL-Lab")                   \
    X(T, INT,    n_cycle,       "1",      "0..1000",        "times that each layer is applied")                                         \
    X(T, BOOL,   ffn,           "false",  NULL,             "feed-forward part in each layer")                                          \
    X(T, CHOICE, ffn_act,       "gelu",   "relu|gelu",      "its activation")                                                           \
    X(T, REAL,   mlp_ratio,     "4",      "0..1000",        "its hidden width over M")                                                  \
    X(T, BOOL,   multi_scale,   "false",  NULL,             "merge 2 x 2 tokens after each layer but the last; the width doubles")      \
    X(T, REAL,   drop_path,     "0",      "0..1",           "stochastic depth of each residual branch")                                 \
    X(T, CHOICE, pool,          "attn",   "attn|mean",      "pooling")                                                                  \
    X(T, CHOICE, da_act,        "relu",   "none|relu|leakyrelu|gelu|silu|tanh|sigmoid", "of the scorer; ungated: relu, gelu, tanh, else none") \
    X(T, BOOL,   da_gated,      "false",  NULL,             "gated scorer")                                                             \
    X(T, BOOL,   da_bias,       "false",  NULL,             "biases in the scorer")                                                     \
    X(T, BOOL,   da_dropout,    "false",  NULL,             "dropout 0.25 in the scorer")                                               \
    X(T, CHOICE, pos,           "ppeg",   "none|ppeg|peg",  "position module; used only with apply_pos")                                \
    X(T, INT,    peg_k,         "7",      "1..99",          "its (first) kernel, odd")                                                  \
    X(T, CHOICE, pos_pos,       "0",      "-1|0|none",      "apply_pos: -1 before the first layer, 0 between the first and the second") \
    X(T, CHOICE, attn,          "ntrans", "ntrans|rrt",     "apply_attn: rrt attends within regions")                                   \
    X(T, BOOL,   epeg,          "false",  NULL,             "attn rrt: 15 taps along the queries, on the scores")                       \
    X(T, INT,    region_num,    "8",      "1..1000000",     "attn rrt: regions per side")                                               \
    X(T, INT,    region_size,   "0",      "0..1000000",     "ours, attn rrt: side of a region instead; 0: by region_num")               \
    X(T, INT,    min_region_num, "0",     "0..1000000000",  "attn rrt: with fewer tokens there is one region")                          \
    X(T, BOOL,   qkv_bias,      "true",   NULL,             "attn rrt: biases of queries, keys, values")                                \
    X(T, BOOL,   shift_size,    "false",  NULL,             "no effect, as in MIL-Lab")                                                 \
    X(T, REAL,   trans_dropout, "0.1",    "0..1",           "no effect, as in MIL-Lab")                                                 \
    X(T, BOOL,   no_norm,       "false",  NULL,             "no effect, as in MIL-Lab")                                                 \
    X(T, BOOL,   apply_attn,    "false",  NULL,             "ours: attn takes effect, as in the paper")                                 \
    X(T, BOOL,   apply_pos,     "false",  NULL,             "ours: pos takes effect, as in the paper")

MILI_CONFIG(mili_rrt, MILI_RRT_OPTIONS);

enum { MILI_RRT_ATTN, MILI_RRT_MEAN };                                            // pool
enum { MILI_RRT_NONE, MILI_RRT_PPEG, MILI_RRT_PEG };                               // pos
enum { MILI_RRT_POS_FIRST, MILI_RRT_POS_SECOND };                                  // pos_pos; none is the class default of MIL-Lab
enum { MILI_RRT_NTRANS, MILI_RRT_REGIONS };                                        // attn
enum { MILI_RRT_LAYERS = 16, MILI_RRT_EPEG = 15, MILI_RRT_SCORER = 128 };         // at most; taps; width A of the scorer
typedef struct mili_rrt_layer {
    mil_norm_layer norm, norm2, merge_norm;
    mil_nystrom_layer nystrom;
    mil_region_attention region;
    mil_linear_layer fc1, fc2, merge;
} mili_rrt_layer;
typedef struct mili_rrt {
    mil_linear_layer embed, classifier;
    mili_rrt_layer layer[MILI_RRT_LAYERS];
    mil_ppeg_layer pos;
    mil_norm_layer norm;
    mil_attention_scorer scorer;
} mili_rrt;

MILI_FN void mili_rrt_declare(mil_builder *b, void *model, const void *config)
{
    mili_rrt *m = (mili_rrt *)model;
    const mili_rrt_config *c = (const mili_rrt_config *)config;
    const int64_t kernels[3] = { c->peg_k, 5, 3 };
    const int regions = c->apply_attn && c->attn == MILI_RRT_REGIONS;
    int64_t M = c->mlp_dim;
    char key[64];
    if (c->mlp_dim != c->embed_dim)
        mil_declare_fail(b, MIL_ERROR_ARGUMENT, "rrt: embed_dim %lld and mlp_dim %lld must be equal", (long long)c->embed_dim, (long long)c->mlp_dim);
    m->embed = mil_declare_linear(b, c->in_dim, c->embed_dim, 1, MIL_LINEAR_KAIMING, "patch_embed.0");
    if (c->pos != MILI_RRT_NONE)
        m->pos = mil_declare_ppeg(b, M, kernels, c->pos == MILI_RRT_PPEG ? 3 : 1, MIL_LINEAR_XAVIER, "encoder.pos_embedding");
    for (int64_t i = 0; i < c->n_layers; i++) {
        mili_rrt_layer *k = &m->layer[i];
        const mil_nystrom_options o = mil_nystrom_options_default(M, c->n_heads, c->trans_dim, c->num_landmarks);
        if (i) snprintf(key, sizeof key, "encoder.layers.%lld", (long long)(i - 1));
        else snprintf(key, sizeof key, "encoder.layer1");
        k->norm = mil_declare_layer_norm(b, M, 1e-5, "%s.norm", key);
        if (regions)
            k->region = mil_declare_region_attention(b, M, c->n_heads, c->trans_dim, c->qkv_bias, c->epeg ? MILI_RRT_EPEG : 0, 0,
                                                     MIL_LINEAR_KAIMING, "%s.attn.attn", key);
        else k->nystrom = mil_declare_nystrom(b, &o, "%s.attn", key);
        if (c->ffn) {
            const int64_t hidden = (int64_t)((double)M * c->mlp_ratio);
            k->norm2 = mil_declare_layer_norm(b, M, 1e-5, "%s.norm2", key);
            k->fc1 = mil_declare_linear(b, M, hidden, 1, MIL_LINEAR_KAIMING, "%s.mlp.fc1", key);
            k->fc2 = mil_declare_linear(b, hidden, M, 1, MIL_LINEAR_KAIMING, "%s.mlp.fc2", key);
        }
        if (!c->multi_scale || i + 1 == c->n_layers) continue;
        k->merge_norm = mil_declare_layer_norm(b, 4 * M, 1e-5, "%s.downsample.norm", key);
        k->merge = mil_declare_linear(b, 4 * M, 2 * M, 0, MIL_LINEAR_KAIMING, "%s.downsample.reduction", key);
        M *= 2;
    }
    m->norm = mil_declare_layer_norm(b, M, 1e-5, "encoder.norm");
    if (c->pool == MILI_RRT_ATTN) {                        // the library's scorer, under keys of its own
        const char *const pool = "encoder.pool_fn.attention";
        mil_activation act = (mil_activation)c->da_act;    // its choices are in the order of mil_activation
        if (!c->da_gated && act != MIL_ACT_RELU && act != MIL_ACT_GELU && act != MIL_ACT_TANH) act = MIL_ACT_NONE;
        m->scorer.gated = c->da_gated;
        m->scorer.activation = act;
        m->scorer.dropout = c->da_dropout ? 0.25 : 0;
        m->scorer.V = mil_declare_linear(b, M, MILI_RRT_SCORER, c->da_bias, MIL_LINEAR_KAIMING, "%s.attention%s.0", pool, c->da_gated ? "_a" : "");
        if (c->da_gated) m->scorer.U = mil_declare_linear(b, M, MILI_RRT_SCORER, c->da_bias, MIL_LINEAR_KAIMING, "%s.attention_b.0", pool);
        snprintf(key, sizeof key, c->da_gated ? "attention_c" : "attention.%d", 1 + (act != MIL_ACT_NONE) + (c->da_dropout != 0));
        m->scorer.w = mil_declare_linear(b, MILI_RRT_SCORER, 1, c->da_bias, MIL_LINEAR_KAIMING, "%s.%s", pool, key);
    }
    m->classifier = mil_declare_linear(b, M, c->num_classes, 1, MIL_LINEAR_KAIMING, "classifier");
}

// PPEG or PEG over the tokens: the first S^2 - N again make them a square. PPEG takes at least a 7 x 7 grid, of the flat sequence.
MILI_FN mil_node *mili_rrt_positions(const mil_ppeg_layer *pos, mil_node *x)
{
    if (!x) return NULL;
    const int64_t N = x->shape[1], S = mili_square_side(N), side = pos->count == 3 ? MILI_MAX(S, 7) : S;
    x = mil_pad(mili_wrap_rows(x, S * S), 1, 0, side * side - S * S);
    return mil_slice(mil_ppeg_forward(pos, x, 0, side), 1, 0, N);
}

// x [B, L, M] -> [B, L, M]: Nystrom attention, or attention within regions of a square grid of tokens.
MILI_FN mil_node *mili_rrt_attention(const mili_rrt_config *c, const mili_rrt_layer *k, mil_node *x)
{
    if (!c->apply_attn || c->attn != MILI_RRT_REGIONS || !x) return mil_nystrom_forward(&k->nystrom, x, NULL, -1, NULL);
    const int64_t B = x->shape[0], L = x->shape[1], R = c->region_num;
    int64_t side = mili_square_side(L), region;
    if (c->region_size > 0) {
        region = c->region_size;
        side = (side + region - 1) / region * region;
    } else if (L < c->min_region_num) region = side += side % 2;
    else {
        side = (side + R - 1) / R * R;
        region = side / R;
    }
    return mil_regions_join(mil_region_attention_forward(&k->region, mil_regions_split(x, side, region)), B, side, region, L);
}

// Four tokens of each 2 x 2 block become one: [even row, even column | odd, even | even, odd | odd, odd].  [B, L, M] -> [B, S^2 / 4, 2M]
MILI_FN mil_node *mili_rrt_merge(const mili_rrt_layer *k, mil_node *x)
{
    static const int axes[6] = { 0, 1, 3, 4, 2, 5 };
    if (!x) return NULL;
    int64_t shape[6], S = mili_square_side(x->shape[1]);
    S += S % 2;
    x = mil_pad(x, 1, 0, S * S - x->shape[1]);
    if (!x) return NULL;
    shape[0] = x->shape[0];
    shape[1] = shape[3] = S / 2;
    shape[2] = shape[4] = 2;
    shape[5] = x->cols;
    x = mil_permute(mil_reshape(x, 6, shape), axes);       // [B, S/2, S/2, column, row, M]
    shape[1] = S * S / 4;
    shape[2] = 4 * shape[5];
    return mil_linear_forward(&k->merge, mil_layer_norm_forward(&k->merge_norm, mil_reshape(x, 3, shape)));
}

MILI_FN void mili_rrt_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    static const mil_activation acts[3] = { MIL_ACT_NONE, MIL_ACT_RELU, MIL_ACT_GELU };
    const mili_rrt *m = (const mili_rrt *)model;
    const mili_rrt_config *c = (const mili_rrt_config *)config;
    const int positions = c->apply_pos && c->pos != MILI_RRT_NONE;
    mil_node *x = mil_activate(mil_linear_forward(&m->embed, in->features), acts[c->act]);     // [B, N, M]
    x = mil_dropout(x, c->dropout, "patch_embed");
    if (positions && c->pos_pos == MILI_RRT_POS_FIRST) x = mili_rrt_positions(&m->pos, x);
    for (int64_t i = 0; i < c->n_layers; i++) {
        const mili_rrt_layer *k = &m->layer[i];
        mili_push_block(in->tape, i);
        if (positions && c->pos_pos == MILI_RRT_POS_SECOND && i == 1) x = mili_rrt_positions(&m->pos, x);
        for (int64_t cycle = 0; cycle < c->n_cycle; cycle++) {
            x = mil_add(x, mil_drop_path(mili_rrt_attention(c, k, mil_layer_norm_forward(&k->norm, x)), c->drop_path, "drop_path"));
            if (!c->ffn) continue;
            mil_node *h = mil_activate(mil_linear_forward(&k->fc1, mil_layer_norm_forward(&k->norm2, x)), acts[c->ffn_act + 1]);
            x = mil_add(x, mil_drop_path(mil_linear_forward(&k->fc2, h), c->drop_path, "drop_path"));
        }
        if (c->multi_scale && i + 1 < c->n_layers) x = mili_rrt_merge(k, x);
        mil_tape_pop(in->tape);
    }
    x = mil_layer_norm_forward(&m->norm, x);                                                   // [B, N', M_f]
    if (c->pool == MILI_RRT_ATTN) {
        mil_node *a = mil_attention_scores(&m->scorer, x);                                     // [B, N', 1]
        mili_report_attention(out, a, a, x, &m->classifier);
        out->attention = mil_squeeze(out->attention_weights, 2);                               // [B, N']
        out->slide_feats = mil_squeeze(mil_softmax_pool(a, x), 1);                             // [B, M_f]
    } else out->slide_feats = mil_squeeze(mil_mean(x, 1), 1);
    out->logits = mil_linear_forward(&m->classifier, out->slide_feats);                        // [B, C]
    out->loss = mili_bag_loss(in, out->logits);
}

// ---- the registry: a row per model ----
// With MIL_ONLY_MODELS only those rows are there whose MIL_MODEL_ macro is defined; what they alone use is then dropped, by the
// linker (-ffunction-sections -Wl,--gc-sections) or, with MIL_STATIC, by the compiler.
#define MILI_ROW(name, title, citation, prefix, T, configs, head, flags) \
    { name, title, citation, prefix, T##_options, MILI_COUNT(T##_options), sizeof(T##_config), configs, MILI_COUNT(configs), \
      sizeof(T), head, flags, T##_declare, T##_forward }

static const mil_architecture mili_architectures[] = {
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_ABMIL)
    MILI_ROW("abmil", "attention pooling, one weight per patch",
             "Ilse, Tomczak, Welling: Attention-based Deep Multiple Instance Learning, ICML 2018",
             "model.", mili_abmil, mili_base_configs, "classifier", MIL_MODEL_BATCHES | MIL_MODEL_MASK),
    MILI_ROW("abmil", "attention pooling over raw features, binary (torchmil)",
             "Ilse, Tomczak, Welling: Attention-based Deep Multiple Instance Learning, ICML 2018",
             "", mili_abmil_torchmil, mili_torchmil_configs, "classifier", MIL_MODEL_BATCHES | MIL_MODEL_MASK),
#endif
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_DSMIL)
    MILI_ROW("dsmil", "max over instances beside attention to the top one of each class",
             "Li, Li, Eliceiri: Dual-stream Multiple Instance Learning Network, CVPR 2021",
             "model.", mili_dsmil, mili_base_configs, "classifier", MIL_MODEL_BATCHES | MIL_MODEL_MASK),
#endif
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_WIKG)
    MILI_ROW("wikg", "a learned graph: each patch mixes in its k best-matching patches",
             "Li, Chen, Chu, Sun, Guan, Han, He: Dynamic Graph Representation with Knowledge-aware Attention for Histopathology Whole Slide "
             "Image Analysis, CVPR 2024",
             "model.", mili_wikg, mili_base_configs, "classifier", MIL_MODEL_BATCHES),
#endif
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_CLAM)
    MILI_ROW("clam", "attention pooling with an instance loss on the most and least attended patches",
             "Lu, Williamson, Chen, Chen, Barbieri, Mahmood: Data-efficient and weakly supervised computational pathology on whole-slide "
             "images, Nature Biomedical Engineering 2021",
             "model.", mili_clam, mili_clam_configs, "classifier instance_classifiers?", 0),
#endif
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_DFTD)
    MILI_ROW("dftd", "two tiers of attention over random pseudo bags",
             "Zhang, Meng, Zhao, Qiao, Yang, Coupland, Zheng: DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning for "
             "Histopathology Whole Slide Image Classification, CVPR 2022",
             "model.", mili_dftd, mili_dftd_configs, "classifier", 0),
#endif
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_TRANSMIL)
    MILI_ROW("transmil", "Nystrom attention with a class token and convolutional positions",
             "Shao et al.: TransMIL, NeurIPS 2021",
             "model.", mili_transmil, mili_base_configs, "classifier", MIL_MODEL_BATCHES),
#endif
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_TRANSFORMER)
    MILI_ROW("transformer", "transformer encoder with a class token, exact attention",
             "Vaswani et al.: Attention Is All You Need, NeurIPS 2017",
             "model.", mili_transformer, mili_transformer_configs, "classifier", 0),
#endif
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_ILRA)
    MILI_ROW("ilra", "attention through a few learned latents and back",
             "Xiang, Zhang: Exploring Low-Rank Property in Multiple Instance Learning, ICLR 2023",
             "model.", mili_ilra, mili_base_configs, "classifier", MIL_MODEL_BATCHES),
#endif
#if !defined(MIL_ONLY_MODELS) || defined(MIL_MODEL_RRT)
    MILI_ROW("rrt", "re-embedding of patches by attention, then attention pooling",
             "Tang et al.: Feature Re-Embedding, CVPR 2024",
             "model.", mili_rrt, mili_base_configs, "classifier", MIL_MODEL_BATCHES),
#endif
    { NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, 0, 0, NULL, 0, NULL, NULL }            // the end: the list is never empty
};
#undef MILI_ROW

MIL_DEF int64_t mil_architecture_count(void) { return MILI_COUNT(mili_architectures) - 1; }
MIL_DEF const mil_architecture *mil_architecture_at(int64_t i)
{
    return i >= 0 && i < mil_architecture_count() ? &mili_architectures[i] : NULL;
}

// ==== >>loss-code: cross-entropy, binary cross-entropy ============================================================
#ifndef MIL_NO_TRAINING
// Cross-entropy of x [B, C] with labels y [B], class weights w [C] and label smoothing e, as torch reduces it:
//   loss = ( (1 - e) sum_b w[y_b] (-log p[b,y_b]) + e/C sum_b sum_c w[c] (-log p[b,c]) ) / sum_b w[y_b]
// The first sum reads the labels' own columns only, so that a logit of -inf elsewhere does no harm.
MIL_DEF mil_node *mil_cross_entropy(mil_node *logits, mil_node *labels, mil_node *class_weights, double label_smoothing)
{
    if (!logits || !labels) return NULL;
    mil_tape *tape = logits->tape;
    if (logits->rank != 2 || logits->shape[0] < 1 || logits->shape[1] < 1)
        return mil_tape_fail(tape, MIL_ERROR_SHAPE, "cross-entropy: logits %s where [B, C] is needed", MILI_SHAPE(logits));
    const int64_t B = logits->shape[0], C = logits->shape[1];
    if (labels->count != B)
        return mil_tape_fail(tape, MIL_ERROR_SHAPE, "cross-entropy: labels %s for logits %s", MILI_SHAPE(labels), MILI_SHAPE(logits));
    if (class_weights && class_weights->count != C)
        return mil_tape_fail(tape, MIL_ERROR_SHAPE, "cross-entropy: class weights %s for %lld classes", MILI_SHAPE(class_weights), (long long)C);
    if (!(label_smoothing >= 0 && label_smoothing <= 1))
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "cross-entropy: label smoothing %g is not in 0..1", label_smoothing);

    mil_node *w = class_weights ? mil_reshape(class_weights, 1, &C) : NULL;                   // [C]
    mil_node *hot = mil_one_hot(mil_reshape(labels, 1, &B), C);                               // [B, C], 1 at the label
    mil_node *lp = mil_log_softmax(logits, 1);                                                // [B, C]
    mil_node *own = mil_mask_fill(lp, hot, 0);                                                // log p at the label, else 0
    mil_node *sum = mil_sum_all(w ? mil_mul(own, w) : own);
    if (label_smoothing > 0) {
        mil_node *all = mil_sum_all(w ? mil_mul(lp, w) : lp);
        sum = mil_add(mil_affine(sum, 1 - label_smoothing, 0), mil_affine(all, label_smoothing / (double)C, 0));
    }
    if (!w) return mil_affine(sum, -1 / (double)B, 0);
    return mil_div(mil_affine(sum, -1, 0), mil_sum_all(mil_mul(hot, w)));
}

// Binary cross-entropy of x with targets t in 0..1, mean over all elements:
//   t q softplus(-x) + (1 - t) softplus(x),  q = pos_weight, softplus(x) = log(1 + e^x) = -log(1 - sigmoid(x))
// Nothing cancels: a sure and right logit of either sign keeps its small loss.
MIL_DEF mil_node *mil_bce_with_logits(mil_node *logits, mil_node *targets, double pos_weight)
{
    if (!logits || !targets) return NULL;
    mil_tape *tape = logits->tape;
    if (logits->count < 1 || logits->count != targets->count)
        return mil_tape_fail(tape, MIL_ERROR_SHAPE, "binary cross-entropy: targets %s for logits %s", MILI_SHAPE(targets), MILI_SHAPE(logits));
    if (!(pos_weight >= 0 && mili_is_finite_f64(pos_weight)))
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "binary cross-entropy: pos_weight %g", pos_weight);
    mil_node *t = mil_reshape(targets, logits->rank, logits->shape);
    mil_node *yes = mil_mul(mil_affine(t, pos_weight, 0), mil_softplus(mil_affine(logits, -1, 0)));
    mil_node *no = mil_mul(mil_affine(t, -1, 1), mil_softplus(logits));
    return mil_affine(mil_sum_all(mil_add(yes, no)), 1 / (double)logits->count, 0);
}

// A copy in the tape's own memory, so that what the target points to may go away after the call.
MILI_FN mil_node *mili_target_input(mil_tape *tape, const char *name, const void *values, mil_dtype dtype, int64_t count)
{
    const size_t bytes = (size_t)count * mil_dtype_size(dtype);
    void *copy = mili_arena_alloc(tape->ctx, &tape->arena, bytes);
    if (!copy) return mili_tape_fail_ctx(tape);
    memcpy(copy, values, bytes);
    const mil_tensor t = mil_tensor_make(copy, dtype, 1, &count);
    return mil_input(tape, name, &t);
}

MILI_FN mil_node *mili_loss_ce(mil_node *logits, const mil_target *target)
{
    mil_tape *tape = logits->tape;
    const int64_t *labels = target->labels ? target->labels : &target->label;
    const double *weights = target->class_weights;
    if (logits->rank != 2) return mil_tape_fail(tape, MIL_ERROR_SHAPE, "loss: logits %s where [B, C] is needed", MILI_SHAPE(logits));
    const int64_t B = logits->shape[0], C = logits->shape[1];
    if (target->count < 1)
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "loss: mil_target.count is %lld, expected %lld; use mil_target_class", (long long)target->count, (long long)B);
    if (target->count != B || (!target->labels && B != 1))
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "loss: %lld label%s for a batch of %lld", (long long)(target->labels ? target->count : 1),
                             target->labels && target->count != 1 ? "s" : "", (long long)B);
    double sum = 0;
    for (int64_t b = 0; b < B; b++) {
        if (labels[b] < 0 || labels[b] >= C)
            return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "loss: label %lld of bag %lld is not one of the classes 0..%lld",
                                 (long long)labels[b], (long long)b, (long long)(C - 1));
        if (weights) sum += weights[labels[b]];
    }
    mil_node *w = NULL;
    if (weights) {
        for (int64_t c = 0; c < C; c++)
            if (!(weights[c] >= 0 && mili_is_finite_f64(weights[c])))
                return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "loss: the weight of class %lld is %g", (long long)c, weights[c]);
        if (!(sum > 0)) return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "loss: the weights of this batch's classes sum to 0");
        w = mili_target_input(tape, "class weights", weights, MIL_F64, C);
    }
    return mil_cross_entropy(logits, mili_target_input(tape, "labels", labels, MIL_I64, B), w, target->label_smoothing);
}

MILI_FN mil_node *mili_loss_bce(mil_node *logits, const mil_target *target)
{
    mil_tape *tape = logits->tape;
    const double *values = target->values ? target->values : &target->value;
    const int64_t count = target->values ? target->count : 1;
    if (count != logits->count)
        return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "loss: %lld target value%s for logits %s", (long long)count, count == 1 ? "" : "s", MILI_SHAPE(logits));
    for (int64_t i = 0; i < count; i++)
        if (!(values[i] >= 0 && values[i] <= 1))
            return mil_tape_fail(tape, MIL_ERROR_ARGUMENT, "loss: target value %lld is %g, not in 0..1", (long long)i, values[i]);
    return mil_bce_with_logits(logits, mili_target_input(tape, "targets", values, MIL_F64, count), target->pos_weight);
}

MIL_DEF mil_node *mil_loss_node(mil_node *logits, const mil_target *target)
{
    if (!logits) return NULL;
    if (!target) return mil_tape_fail(logits->tape, MIL_ERROR_ARGUMENT, "loss: target is NULL");
    switch (target->loss) {
    case MIL_LOSS_CE:  return mili_loss_ce(logits, target);
    case MIL_LOSS_BCE: return mili_loss_bce(logits, target);
    case MIL_LOSS_COUNT: break;
    }
    return mil_tape_fail(logits->tape, MIL_ERROR_ARGUMENT, "loss: %d is no loss", (int)target->loss);
}
#endif

// ==== >>train-code: optimizers, schedules, trainer ================================================================
//
// A step records forward and backward on one tape, which adds each gradient to the trainer's own memory. An update is a
// second tape, recorded once and run again each time: clipping, optimizer, lookahead and EMA are nodes like others, so
// every backend runs them. What changes from update to update (rate, bias corrections) enters as a few scalars per parameter.
#ifndef MIL_NO_TRAINING

#define MILI_TRAIN_MEMBER(type, name, value, range, doc) MILI_C_##type name;
typedef struct mili_train_config { MIL_TRAINER_OPTION_LIST(MILI_TRAIN_MEMBER) } mili_train_config;
#undef MILI_TRAIN_MEMBER
#define MILI_TRAIN_ROW(type, name, value, range, doc) { #name, MIL_OPTION_##type, offsetof(mili_train_config, name), value, range, doc },
static const mil_option mili_train_options[] = { MIL_TRAINER_OPTION_LIST(MILI_TRAIN_ROW) };
#undef MILI_TRAIN_ROW

enum { MILI_SGD, MILI_ADAM, MILI_ADAMW, MILI_RADAM };              // in the order of the option's choices
enum { MILI_MEAN, MILI_SUM };
enum { MILI_CONSTANT, MILI_STEP, MILI_COSINE };

// ---- optimizers, as ops ------------------------------------------------------------------------------------------
// Scalars of one parameter at one update, the input `s` of the ops below.
enum {
    MILI_S_DECAY,                                          // L2 weight decay, added to the gradient
    MILI_S_KEEP,                                           // 1 - lr * decoupled weight decay
    MILI_S_RATE,                                           // the step's factor
    MILI_S_ROOT, MILI_S_EPS,                               // Adam: the step is divided by root * sqrt(v) + eps
    MILI_S_SLOW,                                           // lookahead: how far the slow weights move now, 0: not now
    MILI_SCALARS = 8
};

// SGD of parameter p with gradient g (times c), momentum buffer b; mu = r[0]:
//   d = c g + decay p      b' = mu b + d      p' = p - rate b',  Nesterov: p' = p - rate (d + mu b')
// Results p', and b' where there is momentum. Inputs p, g, c [1], s, b.
MILI_FN void mili_sgd_run(const mil_exec *x)
{
    const int64_t n = x->rows * x->node->cols;
    const mil_real *p = MILI_IN(x, 0), *g = MILI_IN(x, 1), c = MILI_IN(x, 2)[0], *s = MILI_IN(x, 3);
    const mil_real decay = s[MILI_S_DECAY], rate = s[MILI_S_RATE], mu = (mil_real)x->node->r[0];
    mil_real *y = MILI_OUT(x), *b1 = (mil_real *)x->second;
    if (!b1) {
        for (int64_t i = 0; i < n; i++) y[i] = p[i] - rate * (c * g[i] + decay * p[i]);
        return;
    }
    const mil_real *b = MILI_IN(x, 4);
    const int nesterov = (int)x->node->i[0];
    for (int64_t i = 0; i < n; i++) {
        const mil_real d = c * g[i] + decay * p[i];
        b1[i] = mu * b[i] + d;
        y[i] = p[i] - rate * (nesterov ? d + mu * b1[i] : b1[i]);
    }
}
static const mil_op mili_op_sgd = MILI_ROWS_OP("sgd", mili_sgd_run, NULL);

// Adam's running mean m and mean square v of the gradient g (times c); r[0], r[1] = beta1, beta2:
//   d = c g + decay p      m' = m + (1 - beta1) (d - m)      v' = beta2 v + (1 - beta2) d^2
// A square that no number holds counts as a large one, so that a state can always be restored. Results m', v'. Inputs p, g, c [1], s, m, v.
MILI_FN void mili_moments_run(const mil_exec *x)
{
    const int64_t n = x->rows * x->node->cols;
    const mil_real *p = MILI_IN(x, 0), *g = MILI_IN(x, 1), c = MILI_IN(x, 2)[0], *m = MILI_IN(x, 4), *v = MILI_IN(x, 5);
    const mil_real decay = MILI_IN(x, 3)[MILI_S_DECAY], new1 = (mil_real)(1 - x->node->r[0]);
    const mil_real old2 = (mil_real)x->node->r[1], new2 = (mil_real)(1 - x->node->r[1]), most = MILI_REAL_MAX / 4;
    mil_real *m1 = MILI_OUT(x), *v1 = (mil_real *)x->second;
    for (int64_t i = 0; i < n; i++) {
        const mil_real d = c * g[i] + decay * p[i];
        m1[i] = m[i] + new1 * (d - m[i]);
        v1[i] = MILI_MIN(old2 * v[i] + new2 * d * d, most);
    }
}
static const mil_op mili_op_moments = MILI_ROWS_OP("moments", mili_moments_run, NULL);

// Adam's step, also AdamW's and RAdam's, which differ in their scalars only (mili_scalars):
//   p' = keep p - rate m / (root sqrt(v) + eps)
// Inputs p, m, v, s.
MILI_FN void mili_adam_run(const mil_exec *x)
{
    const int64_t n = x->rows * x->node->cols;
    const mil_real *p = MILI_IN(x, 0), *m = MILI_IN(x, 1), *v = MILI_IN(x, 2), *s = MILI_IN(x, 3);
    const mil_real keep = s[MILI_S_KEEP], rate = s[MILI_S_RATE], root = s[MILI_S_ROOT], eps = s[MILI_S_EPS];
    for (int64_t i = 0; i < n; i++) MILI_OUT(x)[i] = keep * p[i] - rate * m[i] / (root * mili_sqrt(v[i]) + eps);
}
static const mil_op mili_op_adam = MILI_ROWS_OP("adam", mili_adam_run, NULL);

// Lookahead: every k-th update the slow weights w move towards p, and p starts again from there.
//   w' = w + alpha (p - w),  p' = w'.  In between alpha is 0 and both stay. Results p', w'. Inputs p, w, s.
MILI_FN void mili_lookahead_run(const mil_exec *x)
{
    const int64_t n = x->rows * x->node->cols;
    const mil_real *p = MILI_IN(x, 0), *w = MILI_IN(x, 1), alpha = MILI_IN(x, 2)[MILI_S_SLOW];
    mil_real *p1 = MILI_OUT(x), *w1 = (mil_real *)x->second;
    for (int64_t i = 0; i < n; i++) {
        w1[i] = alpha > 0 ? w[i] + alpha * (p[i] - w[i]) : w[i];
        p1[i] = alpha > 0 ? w1[i] : p[i];
    }
}
static const mil_op mili_op_lookahead = MILI_ROWS_OP("lookahead", mili_lookahead_run, NULL);

// A node of one of these ops: inputs of p's shape are read row by row, the others whole. second: whether there is one.
MILI_FN mil_node *mili_update_op(const mil_op *op, mil_node *const *input, int count, double r0, double r1, int64_t i0, int second)
{
    if (!input[0]) return NULL;
    const mil_node *p = input[0];
    mil_spec s = mil_spec_make(op, MIL_KIND_ROWS, p->rank, p->shape);
    s.input_count = count;
    for (int i = 0; i < count; i++) {
        if (!input[i]) return NULL;
        s.input[i] = input[i];
        if (mili_same_shape(input[i], p)) s.row_inputs |= 1u << i;
    }
    s.r[0] = r0;
    s.r[1] = r1;
    s.i[0] = i0;
    mil_node *n = mil_record(p->tape, &s);
    if (second) mil_node_second(n, MIL_REAL_DTYPE, p->rank, p->shape);
    return n;
}

// ---- the trainer -------------------------------------------------------------------------------------------------
// One parameter or buffer of the model, and what the trainer holds for it, in its shape; data NULL: not there.
typedef struct mili_slot {
    mil_param *param;
    mil_param  grad;                                       // sum of the gradients since the last update; also param->grad
    mil_param  first, second;                              // Adam: m, v; SGD: momentum in `first`
    mil_param  slow, ema;
    int64_t    updates;                                    // it took part in
    int        has_grad;                                   // since the last update
    int        fresh;                                      // the step being recorded gives it one
    int        active;                                     // in the recorded update
    mil_node  *g;                                          // while that is recorded: what the optimizer is given
    mil_real   scalar[MILI_SCALARS];
} mili_slot;

struct mil_trainer {
    mil_context *ctx;
    mil_model   *model;
    mili_train_config config;
    mil_tape    *tape, *update;
    mili_plan   *plan;                                     // of `update`, NULL: to be recorded
    mil_node    *norm;                                     // on `update`: length of the gradient
    mili_slot   *slot;
    int64_t      slots;
    int64_t      updates, bags, accumulated;               // accumulated: bags since the last update
    uint64_t     seed;
    int          started;                                  // slow weights and EMA hold something
    int          swapped;                                  // the model holds the EMA, and the EMA memory the weights
    double       lr_scale, grad_norm;
    mil_real     scale, ema_rate;                          // inputs of `update`: of the gradient's sum; 1 - decay
};

// What is held for a slot, by name; also the prefix of its tensors in a saved state.
static const char *const mili_held_names[] = { "grad", "first", "second", "slow", "ema" };
enum { MILI_HELD_GRAD, MILI_HELD_FIRST, MILI_HELD_SECOND, MILI_HELD_SLOW, MILI_HELD_EMA, MILI_HELD };

MILI_FN mil_param *mili_held(mili_slot *slot, int kind)
{
    switch (kind) {
    case MILI_HELD_GRAD:   return &slot->grad;
    case MILI_HELD_FIRST:  return &slot->first;
    case MILI_HELD_SECOND: return &slot->second;
    case MILI_HELD_SLOW:   return &slot->slow;
    default:               return &slot->ema;
    }
}

MILI_FN int mili_holds(const mili_train_config *c, const mil_param *p, int kind)
{
    if (p->dtype != MIL_REAL_DTYPE || p->count == 0) return 0;
    if (kind == MILI_HELD_EMA) return c->ema > 0;
    if (!p->trainable) return 0;
    if (kind == MILI_HELD_FIRST) return c->optimizer != MILI_SGD || c->momentum > 0;
    if (kind == MILI_HELD_SECOND) return c->optimizer != MILI_SGD;
    return kind == MILI_HELD_GRAD || c->lookahead;
}

MILI_FN size_t mili_param_bytes(const mil_param *p) { return (size_t)p->count * mil_dtype_size(p->dtype); }

MIL_DEF const mil_option *mil_trainer_options(int *count)
{
    if (count) *count = MILI_COUNT(mili_train_options);
    return mili_train_options;
}

// ---- the schedule ----
// The rate of update number `updates`, from 0.
MILI_FN double mili_schedule(const mili_train_config *c, int64_t updates)
{
    int64_t t = updates / c->schedule_unit, steps = c->steps;
    if (t < c->warmup) return c->warmup_lr + (double)t * (c->lr - c->warmup_lr) / (double)c->warmup;
    if (c->warmup_shift) { t -= c->warmup; steps -= c->warmup; }
    if (c->schedule == MILI_STEP) return c->lr * pow(c->gamma, floor((double)t / c->every));
    if (c->schedule == MILI_COSINE)
        return t >= steps ? c->min_lr : c->min_lr + (c->lr - c->min_lr) * (1 + cos(3.14159265358979323846 * (double)t / (double)steps)) / 2;
    return c->lr;
}

// The EMA's decay at update number `updates`, from 0.
MILI_FN double mili_ema_decay(const mili_train_config *c, int64_t updates)
{
    if (!c->ema_warmup) return c->ema;
    const double q = (double)MILI_MAX(0, updates - c->ema_after - 1);
    return MILI_MAX(0, MILI_MIN(c->ema, 1 - pow(1 + q / c->ema_gamma, -c->ema_power)));
}

MILI_FN mil_status mili_train_check(mil_context *ctx, const mili_train_config *c)
{
    for (int i = 0; i < MILI_COUNT(mili_train_options); i++) {
        double value = 0;
        if (mili_train_options[i].type != MIL_OPTION_REAL) continue;
        memcpy(&value, (const char *)c + mili_train_options[i].offset, sizeof value);
        if (!mili_is_finite_f64(value)) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: option %s is not finite", mili_train_options[i].name);
    }
    if (c->beta1 >= 1 || c->beta2 >= 1) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: beta1 %g and beta2 %g must be below 1", c->beta1, c->beta2);
    if ((mil_real)c->eps == 0) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: eps=%g is 0 as a number of the arithmetic; a gradient of 0 would be divided by it", c->eps);
    if (c->ema >= 1) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: with ema=%g the average would never move; it must be below 1", c->ema);
    if (c->nesterov && c->momentum == 0) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: nesterov needs a momentum above 0");
    if (c->schedule == MILI_COSINE && c->steps < 1) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: schedule=cosine needs steps");
    if (c->schedule == MILI_COSINE && c->warmup >= c->steps)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: warmup=%lld does not end before steps=%lld", (long long)c->warmup, (long long)c->steps);
    if (c->schedule == MILI_STEP && c->every == 0) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: schedule=step needs every above 0");
    if (c->ema_warmup && c->ema_gamma == 0) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: ema_warmup needs ema_gamma above 0");
    return MIL_OK;
}

// ---- life ----
// A block of zeros in p's shape.
MILI_FN mil_status mili_hold(mil_context *ctx, mil_param *held, const mil_param *p)
{
    *held = *p;
    held->trainable = 0;
    held->grad = NULL;
    held->packed = NULL;
    held->packed_bytes = 0;
    held->data = mili_backend_alloc(ctx, mili_param_bytes(p));
    if (!held->data) return ctx->status;
    if (mili_host_memory(ctx)) { memset(held->data, 0, mili_param_bytes(p)); return MIL_OK; }
    void *zeros = mili_alloc_zero(ctx, mili_param_bytes(p));
    if (zeros) mili_upload(ctx, held->data, zeros, mili_param_bytes(p));
    mili_free(ctx, zeros, mili_param_bytes(p));
    return ctx->status;
}

MIL_DEF void mil_trainer_free(mil_trainer *t)
{
    if (!t) return;
    mil_context *ctx = t->ctx;
    if (t->swapped) t->model->averaged = 0;                // they stay in the model, as its own
    for (int64_t i = 0; i < t->slots; i++) {
        mili_slot *slot = &t->slot[i];
        if (slot->grad.data && slot->param->grad == slot->grad.data) slot->param->grad = NULL;
        for (int k = 0; k < MILI_HELD; k++) mili_backend_release(ctx, mili_held(slot, k)->data, mili_param_bytes(slot->param));
    }
    mili_free(ctx, t->slot, (size_t)t->slots * sizeof *t->slot);
    mil_tape_free(t->tape);
    mil_tape_free(t->update);
    mili_free(ctx, t, sizeof *t);
}

MILI_FN mil_status mili_trainer_fill(mil_trainer *t, const char *options)
{
    mil_context *ctx = t->ctx;
    const int count = MILI_COUNT(mili_train_options);
    if (mili_option_defaults(ctx, mili_train_options, count, &t->config, "trainer") != MIL_OK ||
        mili_parse_options(ctx, mili_train_options, count, options, &t->config, "trainer") != MIL_OK ||
        mili_train_check(ctx, &t->config) != MIL_OK)
        return ctx->status;
    t->seed = (uint64_t)t->config.seed;
    t->lr_scale = 1;
    if (mil_tape_create(ctx, &t->tape) != MIL_OK || mil_tape_create(ctx, &t->update) != MIL_OK) return ctx->status;
    const int64_t params = mil_model_param_count(t->model);
    int64_t trainable = 0;
    for (int64_t i = 0; i < params; i++) trainable += mil_model_param(t->model, i)->trainable != 0;
    if (!trainable) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "trainer: the model has no parameter to train");
    t->slot = (mili_slot *)mili_alloc_zero(ctx, (size_t)params * sizeof *t->slot);
    if (!t->slot) return ctx->status;
    t->slots = params;
    for (int64_t i = 0; i < params; i++) t->slot[i].param = mil_model_param(t->model, i);
    for (int64_t i = 0; i < params; i++) {
        mili_slot *slot = &t->slot[i];
        if (slot->param->grad) return mili_fail(ctx, MIL_ERROR_STATE, "trainer: the model has one already; free that first");
        for (int k = 0; k < MILI_HELD; k++)
            if (mili_holds(&t->config, slot->param, k) && mili_hold(ctx, mili_held(slot, k), slot->param) != MIL_OK) return ctx->status;
        slot->param->grad = (mil_real *)slot->grad.data;
    }
    return MIL_OK;
}

MIL_DEF void mil_shuffle(uint64_t seed, uint64_t epoch, int64_t n, int64_t *out)      // Fisher and Yates
{
    if (!out) return;
    for (int64_t i = 0; i < n; i++) out[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)(mili_random_unit(seed, epoch, (uint64_t)i) * (double)(i + 1)), t = out[i];
        out[i] = out[j];
        out[j] = t;
    }
}

MIL_DEF mil_trainer *mil_trainer_create(mil_model *model, const char *options)
{
    if (!model) return NULL;
    mil_context *ctx = mil_model_context(model);
    mili_enter(ctx);
    mil_trainer *t = (mil_trainer *)mili_alloc_zero(ctx, sizeof *t);
    if (!t) return NULL;
    t->ctx = ctx;
    t->model = model;
    if (mili_trainer_fill(t, options) == MIL_OK) return t;
    mil_trainer_free(t);
    return NULL;
}

// ---- an update ----
// The scalars of a parameter's next update at rate lr. Adam with k the update's number, bias corrections c1 = 1 - beta1^k and
// c2 = 1 - beta2^k:
//   adam, adamw:  p - lr/c1 m / (sqrt(v)/sqrt(c2) + eps)
//   radam:        p - lr/c1 m sqrt(c2) r / (sqrt(v) + eps) with r^2 = (rho-4)(rho-2) R / ((R-4)(R-2) rho),
//                 R = 2/(1-beta2) - 1, rho = R - 2 k beta2^k / c2; without the divisor while rho <= 5 (Liu et al. 2020)
MILI_FN void mili_scalars(const mil_trainer *t, mili_slot *slot, double lr)
{
    const mili_train_config *c = &t->config;
    const double k = (double)(slot->updates + 1);
    const double decay = c->decay_all || slot->param->rank > 1 ? c->weight_decay : 0;
    const int decoupled = c->optimizer == MILI_ADAMW || (c->optimizer == MILI_RADAM && c->decoupled);
    double rate = lr, root = 0, eps = 1;
    if (c->optimizer != MILI_SGD) {
        const double c1 = 1 - pow(c->beta1, k), b2k = pow(c->beta2, k), c2 = 1 - b2k;
        rate = lr / c1;
        if (c->optimizer != MILI_RADAM) { root = 1 / sqrt(c2); eps = c->eps; }
        else {
            const double R = 2 / (1 - c->beta2) - 1, rho = R - 2 * k * b2k / c2;
            if (rho > 5) {
                rate *= sqrt(c2) * sqrt((rho - 4) * (rho - 2) * R / ((R - 4) * (R - 2) * rho));
                root = 1;
                eps = c->eps;
            }
        }
    }
    slot->scalar[MILI_S_DECAY] = (mil_real)(decoupled ? 0 : decay);
    slot->scalar[MILI_S_KEEP] = (mil_real)(decoupled ? 1 - lr * decay : 1);
    slot->scalar[MILI_S_RATE] = (mil_real)rate;
    slot->scalar[MILI_S_ROOT] = (mil_real)root;
    slot->scalar[MILI_S_EPS] = (mil_real)eps;
    slot->scalar[MILI_S_SLOW] = (mil_real)((t->updates + 1) % c->lookahead_k == 0 ? c->lookahead_alpha : 0);
}

MILI_FN mil_node *mili_scalar_input(mil_tape *tape, const char *name, const mil_real *values, int64_t count)
{
    const mil_tensor t = mil_tensor_make(values, MIL_REAL_DTYPE, 1, &count);
    return mil_input(tape, name, &t);
}

// The parameter after optimizer and lookahead; `c` [1] is the gradient's factor.
MILI_FN mil_node *mili_record_step(mil_trainer *t, mili_slot *slot, mil_node *c)
{
    mil_tape *tape = t->update;
    const mili_train_config *o = &t->config;
    mil_node *p = mil_use(tape, slot->param), *s = mili_scalar_input(tape, "scalars", slot->scalar, MILI_SCALARS);
    mil_node *in[6], *y;
    in[0] = p;
    in[1] = slot->g;
    in[2] = c;
    in[3] = s;
    if (o->optimizer == MILI_SGD) {
        const int momentum = o->momentum > 0;
        if (momentum) in[4] = mil_use(tape, &slot->first);
        y = mili_update_op(&mili_op_sgd, in, momentum ? 5 : 4, o->momentum, 0, o->nesterov, momentum);
        if (y && momentum) mil_update(&slot->first, y->second);
    } else {
        in[4] = mil_use(tape, &slot->first);
        in[5] = mil_use(tape, &slot->second);
        mil_node *m = mili_update_op(&mili_op_moments, in, 6, o->beta1, o->beta2, 0, 1);
        if (!m) return NULL;
        mil_update(&slot->first, m);
        mil_update(&slot->second, m->second);
        in[1] = m;
        in[2] = m->second;
        y = mili_update_op(&mili_op_adam, in, 4, 0, 0, 0, 0);
    }
    if (!o->lookahead || !y) return y;
    in[0] = y;
    in[1] = mil_use(tape, &slot->slow);
    in[2] = s;
    y = mili_update_op(&mili_op_lookahead, in, 3, 0, 0, 0, 1);
    if (y) mil_update(&slot->slow, y->second);
    return y;
}

// Records the update of the active slots.
//   g = scale * sum of the gradients, cut to +-clip_value      norm = |g| over all parameters
//   g *= min(1, clip_norm / (norm + 1e-6))      p' = optimizer(p, g)      ema' = ema + (1 - decay) (p' - ema)
MILI_FN void mili_record_update(mil_trainer *t)
{
    mil_tape *tape = t->update;
    const mili_train_config *o = &t->config;
    const int64_t one = 1;
    mil_node *scale = mili_scalar_input(tape, "scale", &t->scale, 1), *squares = NULL;
    mil_node *ema_rate = o->ema > 0 ? mili_scalar_input(tape, "ema rate", &t->ema_rate, 1) : NULL;
    for (int64_t i = 0; i < t->slots; i++) {
        mili_slot *slot = &t->slot[i];
        if (!slot->active) continue;
        slot->g = mil_use(tape, &slot->grad);
        if (o->clip_value > 0) slot->g = mil_clamp(mil_mul(slot->g, scale), -o->clip_value, o->clip_value);
        mil_node *sum = mil_sum_all(mil_square(slot->g));
        squares = squares ? mil_add(squares, sum) : sum;
    }
    if (o->clip_value > 0) scale = mil_constant(tape, 1, &one, 1);
    t->norm = mil_mul(mil_sqrt(squares), scale);                                    // [1]
    mil_node_keep(t->norm);
    if (o->clip_norm > 0)
        scale = mil_mul(scale, mil_clamp(mil_div(mil_constant(tape, 1, &one, o->clip_norm), mil_affine(t->norm, 1, 1e-6)), 0, 1));
    for (int64_t i = 0; i < t->slots; i++) {
        mili_slot *slot = &t->slot[i];
        mil_node *p = slot->active ? mili_record_step(t, slot, scale) : NULL;
        if (p) mil_update(slot->param, p);
        if (!slot->ema.data) continue;
        mil_node *ema = mil_use(tape, &slot->ema);
        if (!p) p = mil_use(tape, slot->param);
        mil_update(&slot->ema, mil_add(ema, mil_mul(mil_sub(p, ema), ema_rate)));
    }
}

MILI_FN mil_status mili_copy_value(mil_context *ctx, void *dst, const void *src, size_t bytes)
{
    if (mili_host_memory(ctx)) { memcpy(dst, src, bytes); return MIL_OK; }
    void *copy = mili_alloc(ctx, bytes);
    if (copy && mili_download(ctx, copy, src, bytes) == MIL_OK) mili_upload(ctx, dst, copy, bytes);
    mili_free(ctx, copy, bytes);
    return ctx->status;
}

// Everything that an update can lack, so that once the step has run it cannot fail for memory: the recorded tape, its
// workspace, and before the first update the start of slow weights and EMA.
MILI_FN mil_status mili_prepare_update(mil_trainer *t)
{
    mil_context *ctx = t->ctx;
    int same = t->plan != NULL, any = 0;
    for (int64_t i = 0; i < t->slots; i++) {
        mili_slot *slot = &t->slot[i];
        const int active = (slot->has_grad || slot->fresh) && !slot->param->frozen;
        same &= active == slot->active;
        any |= active;
        slot->active = active;
    }
    if (!any) return mili_fail(ctx, MIL_ERROR_STATE, "trainer: every parameter that has a gradient is frozen");
    if (!same) {
        t->plan = NULL;
        mil_tape_reset(t->update);
        mili_record_update(t);
        if (mil_tape_status(t->update) != MIL_OK || mili_plan_run(t->update, &t->plan) != MIL_OK) return ctx->status;
        mili_plan_done(t->update, t->plan);                // it is kept, and run at every update
    }
    if (!t->started && mili_host_memory(ctx) == 0 && ctx->backend) ctx->backend->synchronize(ctx->backend_self);
    for (int64_t i = 0; i < t->slots && !t->started; i++) {
        const mili_slot *slot = &t->slot[i];
        const size_t bytes = mili_param_bytes(slot->param);
        if (slot->slow.data && mili_copy_value(ctx, slot->slow.data, slot->param->data, bytes) != MIL_OK) return ctx->status;
        if (slot->ema.data && mili_copy_value(ctx, slot->ema.data, slot->param->data, bytes) != MIL_OK) return ctx->status;
    }
    return MIL_OK;
}

MILI_FN mil_status mili_run_update(mil_trainer *t)
{
    mil_context *ctx = t->ctx;
    const double lr = mil_trainer_lr(t);
    mil_real norm = 0;
    t->scale = (mil_real)(t->config.reduction == MILI_MEAN ? 1 / (double)t->accumulated : 1);
    t->ema_rate = (mil_real)(1 - mili_ema_decay(&t->config, t->updates));
    for (int64_t i = 0; i < t->slots; i++) if (t->slot[i].active) mili_scalars(t, &t->slot[i], lr);
    mil_status status = mili_run_steps(t->update, t->plan);
    if (status == MIL_OK) status = mil_node_read(t->norm, &norm, 1);
    if (status == MIL_OK && !mili_is_finite(norm))
        status = mili_fail(ctx, MIL_ERROR_NUMERIC, "trainer: the gradient of update %lld is not finite", (long long)t->updates);
    if (status == MIL_OK) status = mili_apply_updates(t->update, t->plan);
    if (status == MIL_OK) {
        for (int64_t i = 0; i < t->slots; i++) t->slot[i].updates += t->slot[i].active;
        t->grad_norm = (double)norm;
        t->updates++;
        mil_model_set_metadata(t->model, "mil.head", NULL);    // what it says of a fresh head is true no more
        t->started = 1;
    }
    for (int64_t i = 0; i < t->slots; i++) t->slot[i].has_grad = 0;
    t->accumulated = 0;
    return status;
}

MILI_FN mil_status mili_not_swapped(const mil_trainer *t, const char *call)
{
    return t->swapped ? mili_fail(t->ctx, MIL_ERROR_STATE, "%s: the averaged weights are swapped in; swap them back first", call) : MIL_OK;
}

MIL_DEF mil_status mil_trainer_flush(mil_trainer *t)
{
    if (!t) return MIL_ERROR_ARGUMENT;
    mili_enter(t->ctx);
    if (mili_not_swapped(t, "mil_trainer_flush") != MIL_OK) return t->ctx->status;
    if (t->accumulated == 0) return MIL_OK;
    for (int64_t i = 0; i < t->slots; i++) t->slot[i].fresh = 0;
    return mili_prepare_update(t) == MIL_OK ? mili_run_update(t) : t->ctx->status;
}

// ---- a step ----
// Forward, backward, and the sums of gradients as updates of the trainer's own memory.
MILI_FN mil_status mili_record_bag(mil_trainer *t, const mil_bag *bag, const mil_target *target, int want_logits, mil_outputs *out)
{
    mil_tape *tape = t->tape;
    int any = 0;
    mil_tape_training(tape, 1);
    mil_tape_seed(tape, t->seed, (uint64_t)t->bags);
    mil_model_record(tape, t->model, bag, target, out);
    if (tape->status == MIL_OK && !out->loss) mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "trainer: the model gives no loss");
    if (tape->status == MIL_OK && want_logits && !out->logits) mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "trainer: the model gives no logits");
    mil_node_keep(out->loss);
    if (want_logits) mil_node_keep(out->logits);
    mil_tape_backward(tape, out->loss);
    for (int64_t i = 0; i < t->slots; i++) {
        mili_slot *slot = &t->slot[i];
        mil_node *g = slot->grad.data && !slot->param->frozen ? mil_node_grad(mil_use(tape, slot->param)) : NULL;
        slot->fresh = g != NULL;
        any |= slot->fresh;
        if (!g) continue;
        g = mil_reshape(g, slot->grad.rank, slot->grad.shape);
        mil_update(&slot->grad, slot->has_grad ? mil_add(mil_use(tape, &slot->grad), g) : g);
    }
    if (tape->status == MIL_OK && !any) mil_tape_fail(tape, MIL_ERROR_STATE, "trainer: every parameter that the loss depends on is frozen");
    return mil_tape_status(tape);
}

MILI_FN mil_status mili_loss_not_finite(mil_trainer *t, const mil_bag *bag, const char *call)
{
    const int64_t row = mili_bag_not_finite(t->ctx, bag);
    if (row >= 0)
        return mili_fail(t->ctx, MIL_ERROR_NUMERIC, "%s: the loss is not finite; row %lld of the features holds NaN or infinity; nothing was updated", call, (long long)row);
    return mili_fail(t->ctx, MIL_ERROR_NUMERIC, "%s: the loss is not finite after %lld bags, though the features are; nothing was updated", call, (long long)t->bags);
}

MIL_DEF mil_status mil_trainer_evaluate(mil_trainer *t, const mil_bag *bag, const mil_target *target, double *loss, mil_real *logits)
{
    if (!t) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = t->ctx;
    mil_tape *tape = t->tape;
    mil_outputs out;
    mil_real value = 0;
    mili_enter(ctx);
    if (!bag || !target) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_trainer_evaluate: bag or target is NULL");
    if (tape->count > 0) mil_tape_reset(tape);             // else it may hold the caller's draws
    mil_tape_training(tape, 0);
    mil_tape_seed(tape, t->seed, (uint64_t)t->bags);
    mil_model_record(tape, t->model, bag, target, &out);
    if (tape->status == MIL_OK && !out.loss) mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "trainer: the model gives no loss");
    if (tape->status == MIL_OK && logits && !out.logits) mil_tape_fail(tape, MIL_ERROR_UNSUPPORTED, "trainer: the model gives no logits");
    mil_node_keep(out.loss);
    if (logits) mil_node_keep(out.logits);
    if (mil_tape_run(tape) != MIL_OK || mil_node_read(out.loss, &value, 1) != MIL_OK) goto failed;
    if (!mili_is_finite(value)) {
        mili_loss_not_finite(t, bag, "mil_trainer_evaluate");
        goto failed;
    }
    if (logits && mil_node_read(out.logits, logits, out.logits->count) != MIL_OK) goto failed;
    if (loss) *loss = (double)value;
    return MIL_OK;
failed:
    mil_tape_reset(tape);
    return ctx->status;
}

MIL_DEF mil_status mil_trainer_step(mil_trainer *t, const mil_bag *bag, const mil_target *target, double *loss, mil_real *logits)
{
    if (!t) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = t->ctx;
    mil_tape *tape = t->tape;
    mil_outputs out;
    mili_plan *plan = NULL;
    mil_real value = 0;
    mili_enter(ctx);
    if (mili_not_swapped(t, "mil_trainer_step") != MIL_OK) return ctx->status;
    if (!bag || !target) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_trainer_step: bag or target is NULL");
    const int full = t->accumulated + 1 >= t->config.accumulate;
    if (tape->count > 0) mil_tape_reset(tape);             // else it may hold the caller's draws
    if (mili_record_bag(t, bag, target, logits != NULL, &out) != MIL_OK || mili_plan_run(tape, &plan) != MIL_OK) goto failed;
    if (full && mili_prepare_update(t) != MIL_OK) goto failed;

    if (mili_run_steps(tape, plan) != MIL_OK) goto failed;
    mili_plan_done(tape, plan);
    if (mil_node_read(out.loss, &value, 1) != MIL_OK) goto failed;
    if (!mili_is_finite(value)) {
        mili_loss_not_finite(t, bag, "mil_trainer_step");
        goto failed;
    }
    if (logits && mil_node_read(out.logits, logits, out.logits->count) != MIL_OK) goto failed;
    if (mili_apply_updates(tape, plan) != MIL_OK) goto failed;
    if (loss) *loss = (double)value;
    t->bags++;
    t->accumulated++;
    for (int64_t i = 0; i < t->slots; i++) t->slot[i].has_grad |= t->slot[i].fresh;
    return full ? mili_run_update(t) : MIL_OK;

failed:
    mil_tape_reset(tape);                                  // the sentence stands in the context
    return ctx->status;
}

MIL_DEF int64_t mil_trainer_steps(const mil_trainer *t) { return t ? t->updates : 0; }
MIL_DEF double mil_trainer_lr(const mil_trainer *t) { return t ? mili_schedule(&t->config, t->updates) * t->lr_scale : 0; }
MIL_DEF double mil_trainer_grad_norm(const mil_trainer *t) { return t ? t->grad_norm : 0; }
MIL_DEF void mil_trainer_scale_lr(mil_trainer *t, double factor) { if (t && factor >= 0 && mili_is_finite_f64(t->lr_scale * factor)) t->lr_scale *= factor; }
MIL_DEF void mil_trainer_seed(mil_trainer *t, uint64_t seed) { if (t) t->seed = seed; }
MIL_DEF mil_tape *mil_trainer_tape(mil_trainer *t) { return t ? t->tape : NULL; }

MIL_DEF mil_status mil_trainer_swap_ema(mil_trainer *t)
{
    if (!t) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = t->ctx;
    mili_enter(ctx);
    if (t->config.ema == 0) return mili_fail(ctx, MIL_ERROR_STATE, "mil_trainer_swap_ema: the trainer was made without ema");
    if (!t->started) return mili_fail(ctx, MIL_ERROR_STATE, "mil_trainer_swap_ema: there was no update yet");
    size_t most = 0;
    for (int64_t i = 0; i < t->slots; i++) most = MILI_MAX(most, mili_param_bytes(t->slot[i].param));
    char *copy = mili_host_memory(ctx) ? NULL : (char *)mili_alloc(ctx, 2 * most);
    if (ctx->status != MIL_OK) return ctx->status;
    if (ctx->backend) ctx->backend->synchronize(ctx->backend_self);
    for (int64_t i = 0; i < t->slots; i++) {
        mili_slot *slot = &t->slot[i];
        if (!slot->ema.data) continue;
        const size_t bytes = mili_param_bytes(slot->param);
        if (copy) {
            if (mili_download(ctx, copy, slot->param->data, bytes) != MIL_OK || mili_download(ctx, copy + most, slot->ema.data, bytes) != MIL_OK ||
                mili_upload(ctx, slot->param->data, copy + most, bytes) != MIL_OK || mili_upload(ctx, slot->ema.data, copy, bytes) != MIL_OK)
                break;
        } else {
            mil_real *a = (mil_real *)slot->param->data, *b = (mil_real *)slot->ema.data;
            for (int64_t j = 0; j < slot->param->count; j++) {
                const mil_real x = a[j];
                a[j] = b[j];
                b[j] = x;
            }
        }
        slot->param->version++;
    }
    mili_free(ctx, copy, 2 * most);
    if (ctx->status == MIL_OK) t->swapped = t->model->averaged = !t->swapped;
    return ctx->status;
}

// ---- a trainer's state as safetensors ----
// Tensors: `counters` MIL_I64 [MILI_COUNTERS], `updates` MIL_I64 [slots], `lr_scale` MIL_F64 [1], and per parameter and kind
// `<kind>.<key>` in the parameter's shape. `grad` only for what has one; `slow` and `ema` only after the first update.
#define MILI_STATE_VERSION "2"
enum { MILI_COUNT_UPDATES, MILI_COUNT_BAGS, MILI_COUNT_ACCUMULATED, MILI_COUNT_STARTED, MILI_COUNT_SEED, MILI_COUNTERS };

// The options as "key=value key=value". Writes at most `room` bytes with the final 0, returns the length.
MILI_FN size_t mili_train_print(const mili_train_config *c, char *dst, size_t room)
{
    size_t at = 0;
    for (int i = 0; i < MILI_COUNT(mili_train_options); i++) {
        char text[64];
        mili_option_print(&mili_train_options[i], c, text, sizeof text, 0);
        at += (size_t)snprintf(at < room ? dst + at : NULL, at < room ? room - at : 0, "%s%s=%s", i ? " " : "", mili_train_options[i].name, text);
    }
    return at;
}

// Options of a saved state must be the trainer's. The seed is the state's.
MILI_FN mil_status mili_train_compare(mil_trainer *t, const char *saved)
{
    mil_context *ctx = t->ctx;
    const int count = MILI_COUNT(mili_train_options);
    mili_train_config other;
    memset(&other, 0, sizeof other);
    if (mili_option_defaults(ctx, mili_train_options, count, &other, "trainer state") != MIL_OK) return ctx->status;
    if (mili_parse_options(ctx, mili_train_options, count, saved, &other, "trainer state") != MIL_OK) return ctx->status;
    for (int i = 0; i < count; i++) {
        const mil_option *o = &mili_train_options[i];
        char theirs[64], ours[64];
        mili_option_print(o, &other, theirs, sizeof theirs, 0);
        mili_option_print(o, &t->config, ours, sizeof ours, 0);
        if (strcmp(o->name, "seed") != 0 && strcmp(theirs, ours) != 0)
            return mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: of a trainer with %s=%s, this one has %s=%s", o->name, theirs, o->name, ours);
    }
    return MIL_OK;
}

// Whether the state holds this kind of this slot.
MILI_FN int mili_is_saved(const mil_trainer *t, const mili_slot *slot, int kind, int started)
{
    if (!mili_holds(&t->config, slot->param, kind)) return 0;
    if (kind == MILI_HELD_GRAD) return slot->has_grad;
    return started || (kind != MILI_HELD_SLOW && kind != MILI_HELD_EMA);
}

MILI_FN char *mili_state_name(mil_context *ctx, mili_arena *arena, int kind, const char *key)
{
    const size_t room = strlen(mili_held_names[kind]) + strlen(key) + 2;
    char *name = (char *)mili_arena_alloc(ctx, arena, room);
    if (name) snprintf(name, room, "%s.%s", mili_held_names[kind], key);
    return name;
}

MIL_DEF mil_status mil_trainer_save(const mil_trainer *t, void *dst, size_t *size)
{
    if (!t) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = t->ctx;
    mili_enter(ctx);
    if (!size) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_trainer_save: size is NULL");
    if (mili_not_swapped(t, "mil_trainer_save") != MIL_OK) return ctx->status;
    if (ctx->backend) ctx->backend->synchronize(ctx->backend_self);

    mili_arena arena;
    memset(&arena, 0, sizeof arena);
    const size_t most = (size_t)t->slots * MILI_HELD + 3;
    mil_tensor *tensor = (mil_tensor *)mili_arena_alloc(ctx, &arena, most * sizeof *tensor);
    const char **name = (const char **)mili_arena_alloc(ctx, &arena, most * sizeof *name);
    int64_t *updates = (int64_t *)mili_arena_alloc(ctx, &arena, (size_t)t->slots * sizeof *updates);
    int64_t counter[MILI_COUNTERS], shape = MILI_COUNTERS, one = 1, count = 0;
    const size_t room = mili_train_print(&t->config, NULL, 0) + 1;
    char *options = (char *)mili_arena_alloc(ctx, &arena, room);
    mil_meta meta[2];
    if (!tensor || !name || !updates || !options) goto done;
    mili_train_print(&t->config, options, room);

    counter[MILI_COUNT_UPDATES] = t->updates;
    counter[MILI_COUNT_BAGS] = t->bags;
    counter[MILI_COUNT_ACCUMULATED] = t->accumulated;
    counter[MILI_COUNT_STARTED] = t->started;
    memcpy(&counter[MILI_COUNT_SEED], &t->seed, sizeof t->seed);
    name[count] = "counters";
    tensor[count++] = mil_tensor_make(counter, MIL_I64, 1, &shape);
    name[count] = "lr_scale";
    tensor[count++] = mil_tensor_make(&t->lr_scale, MIL_F64, 1, &one);
    name[count] = "updates";
    tensor[count++] = mil_tensor_make(updates, MIL_I64, 1, &t->slots);
    for (int64_t i = 0; i < t->slots; i++) {
        mili_slot *slot = &t->slot[i];
        updates[i] = slot->updates;
        for (int k = 0; k < MILI_HELD; k++) {
            if (!mili_is_saved(t, slot, k, t->started)) continue;
            const mil_param *held = mili_held(slot, k);
            void *data = held->data;
            if (!mili_host_memory(ctx) && dst) {
                data = mili_arena_alloc(ctx, &arena, mili_param_bytes(held));
                if (!data || mili_download(ctx, data, held->data, mili_param_bytes(held)) != MIL_OK) goto done;
            }
            name[count] = mili_state_name(ctx, &arena, k, slot->param->key);
            if (!name[count]) goto done;
            tensor[count++] = mil_tensor_make(data, held->dtype, held->rank, held->shape);
        }
    }
    meta[0].key = "mil.trainer";
    meta[0].value = MILI_STATE_VERSION;
    meta[1].key = "mil.options";
    meta[1].value = options;
    mil_tensors_write_memory(ctx, tensor, name, count, meta, 2, dst, size);
done:
    mili_arena_free(ctx, &arena);
    return ctx->status;
}

// The tensor `name` of this dtype and shape, or NULL with an error.
MILI_FN const mil_tensor *mili_state_tensor(mil_context *ctx, const mil_tensors *file, const char *name, mil_dtype dtype, int rank, const int64_t *shape)
{
    const mil_tensor *x = mil_tensors_get(file, name);
    int same = x && x->dtype == dtype && x->rank == rank;
    for (int a = 0; same && a < rank; a++) same = x->shape[a] == shape[a];
    if (same) return x;
    if (!x) mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: tensor %s is missing", name);
    else mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: tensor %s is %s %s, not %s %s", name, mil_dtype_name(x->dtype),
                   mili_shape_text(x->rank, x->shape).s, mil_dtype_name(dtype), mili_shape_text(rank, shape).s);
    return NULL;
}

#define MILI_MOST_STEPS ((int64_t)1 << 53)                   // what a double counts

// Checks the state and, with `take`, copies it. Taking cannot fail on memory that checking has passed, but for a backend's.
MILI_FN mil_status mili_state_read(mil_trainer *t, mili_arena *arena, const mil_tensors *file, int take)
{
    mil_context *ctx = t->ctx;
    int64_t counter[MILI_COUNTERS], shape = MILI_COUNTERS, one = 1, known = 3;
    double lr_scale;
    const char *version = mil_tensors_meta(file, "mil.trainer"), *saved = mil_tensors_meta(file, "mil.options");
    if (!version || strcmp(version, MILI_STATE_VERSION) != 0)
        return mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: %s", version ? "of another version of this library" : "this is not one");
    if (!saved) return mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: its options are missing");
    if (mili_train_compare(t, saved) != MIL_OK) return ctx->status;
    const mil_tensor *counters = mili_state_tensor(ctx, file, "counters", MIL_I64, 1, &shape);
    const mil_tensor *scale = mili_state_tensor(ctx, file, "lr_scale", MIL_F64, 1, &one);
    const mil_tensor *updates = mili_state_tensor(ctx, file, "updates", MIL_I64, 1, &t->slots);
    if (!counters || !scale || !updates) return ctx->status;
    memcpy(counter, counters->data, sizeof counter);
    memcpy(&lr_scale, scale->data, sizeof lr_scale);
    const int started = counter[MILI_COUNT_STARTED] != 0;
    if (counter[MILI_COUNT_UPDATES] < 0 || counter[MILI_COUNT_BAGS] < 0 || counter[MILI_COUNT_ACCUMULATED] < 0 ||
        counter[MILI_COUNT_ACCUMULATED] > counter[MILI_COUNT_BAGS] || counter[MILI_COUNT_ACCUMULATED] >= MILI_MAX(t->config.accumulate, 1) ||
        counter[MILI_COUNT_UPDATES] > MILI_MOST_STEPS || counter[MILI_COUNT_BAGS] > MILI_MOST_STEPS || started != (counter[MILI_COUNT_UPDATES] > 0) || !mili_is_finite_f64(lr_scale))
        return mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: the counters contradict each other");

    for (int64_t i = 0; i < t->slots; i++) {
        mili_slot *slot = &t->slot[i];
        int64_t n;
        memcpy(&n, (const char *)updates->data + (size_t)i * sizeof n, sizeof n);
        if (n < 0 || n > counter[MILI_COUNT_UPDATES]) return mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: %s had %lld updates", slot->param->key, (long long)n);
        if (take) slot->updates = n;
        for (int k = 0; k < MILI_HELD; k++) {
            char *name = mili_state_name(ctx, arena, k, slot->param->key);
            if (!name) return ctx->status;
            const int has_grad = k == MILI_HELD_GRAD && counter[MILI_COUNT_ACCUMULATED] > 0 && slot->grad.data && mil_tensors_get(file, name);
            if (take && k == MILI_HELD_GRAD) slot->has_grad = has_grad;
            if (k == MILI_HELD_GRAD ? !has_grad : !mili_is_saved(t, slot, k, started)) continue;
            const mil_param *held = mili_held(slot, k);
            const mil_tensor *x = mili_state_tensor(ctx, file, name, held->dtype, held->rank, held->shape);
            if (!x) return ctx->status;
            known++;
            if (take && mili_upload(ctx, held->data, x->data, mili_param_bytes(held)) != MIL_OK) return ctx->status;
            for (int64_t j = 0; j < held->count && !take; j++) {
                mil_real v;
                memcpy(&v, (const char *)x->data + (size_t)j * sizeof v, sizeof v);
                if (!mili_is_finite(v) || (k == MILI_HELD_SECOND && v < 0))
                    return mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: %s[%lld] is %g", name, (long long)j, (double)v);
            }
        }
    }
    if (known != mil_tensors_count(file))
        return mili_fail(ctx, MIL_ERROR_FORMAT, "trainer state: %lld tensors where a model of these parameters has %lld",
                         (long long)mil_tensors_count(file), (long long)known);
    if (!take) return MIL_OK;
    t->updates = counter[MILI_COUNT_UPDATES];
    t->bags = counter[MILI_COUNT_BAGS];
    t->accumulated = counter[MILI_COUNT_ACCUMULATED];
    t->started = started;
    memcpy(&t->seed, &counter[MILI_COUNT_SEED], sizeof t->seed);
    t->lr_scale = lr_scale;
    return MIL_OK;
}

MIL_DEF mil_status mil_trainer_restore(mil_trainer *t, const void *bytes, size_t size)
{
    if (!t) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = t->ctx;
    mil_tensors *file = NULL;
    mili_arena arena;
    memset(&arena, 0, sizeof arena);
    mili_enter(ctx);
    if (mili_not_swapped(t, "mil_trainer_restore") != MIL_OK) return ctx->status;
    if (mil_tensors_open_memory(ctx, bytes, size, 0, &file) != MIL_OK) return ctx->status;
    if (mili_state_read(t, &arena, file, 0) == MIL_OK) {
        mili_arena_reset(&arena);
        mili_state_read(t, &arena, file, 1);
    }
    mili_arena_free(ctx, &arena);
    mil_tensors_free(file);
    return ctx->status;
}
#endif

// ==== >>score-code: scorer ========================================================================================
//
// A stream. The model is recorded once, with `capacity` instances in place of the number that nobody knows yet. The plan
// then has one row group that reads the features; pushed rows are fed to it tile by tile, and its states (running maxima,
// sums) wait in between. Asking for results feeds the last, incomplete tile to a copy of the states, finishes the
// reductions and runs the steps behind them; the states are then put back. Tiles and partitions are those of a whole bag,
// so the bits are too. A whole bag is scored the same way, which keeps the packed weights; models that cannot be streamed
// are recorded anew for each bag.

struct mil_scorer {
    mil_context *ctx;
    mil_model   *model;
    mil_scorer_options options;
    mil_tape    *tape, *whole;                             // the stream's; of bags that cannot be streamed
    mil_node    *node[2][MIL_RESULT_COUNT];                // results, by `streamed`
    int64_t      whole_rows;                               // instances of the bag in `whole`
    int          streamed;                                 // the bag is in the stream, not in `whole`
    int          scored;                                   // the bag came whole: a push begins another
    int          refused;                                  // the model cannot be streamed
    unsigned     gives[2];                                 // bits of results that the model has, by `streamed`
    int64_t      version;                                  // of the weights that are packed
    int64_t     *order;                                    // room to sort `order_rows` instances, for ranks
    int64_t      order_rows;
    char         reason[MILI_ERROR_SIZE];
    mili_plan   *plan;
    int          step;                                     // that reads the features
    mili_group   group;
    mil_node    *features;
    int64_t      capacity, fed, staged;                    // rows in the states; rows waiting in `stage`
    int64_t      results_at;                               // rows that the results in the workspace are of; -1: none
    mil_real    *stage;
    int64_t      stage_rows;
    int          whole_waves;                              // a reduction reads the features of many tiles at once
    char        *saved;                                    // states, during a query or a push
    size_t       saved_bytes;
};

MIL_DEF mil_scorer_options mil_scorer_options_default(void)
{
    mil_scorer_options o;
    o.capacity = 0;
    o.results = 1u << MIL_ATTENTION;
    return o;
}

MIL_DEF const char *mil_result_name(mil_result result)
{
#define MILI_RESULT_NAME(name, key, text) key,
    static const char *const names[] = { MIL_RESULT_LIST(MILI_RESULT_NAME) };
#undef MILI_RESULT_NAME
    return (unsigned)result < (unsigned)MILI_COUNT(names) ? names[result] : "?";
}

// Keeps what will be read: logits always, the rest as asked for.
MILI_FN void mili_scorer_keep(mil_scorer *s, const mil_outputs *out, int streamed)
{
    mil_node *results[MIL_RESULT_COUNT];
    memset((void *)results, 0, sizeof results);
    results[MIL_LOGITS] = out->logits;
    results[MIL_ATTENTION] = out->attention_scores ? out->attention_scores : out->attention_weights;
    results[MIL_WEIGHTS] = out->attention_weights;
    results[MIL_RANK] = results[MIL_ATTENTION];
    if (results[MIL_RANK] && results[MIL_RANK]->rank != 3) results[MIL_RANK] = NULL;           // [B, N, K]
    results[MIL_CONTRIBUTION] = out->contribution;
    results[MIL_SLIDE_FEATS] = out->slide_feats;
    s->gives[streamed] = 0;
    for (int r = 0; r < MIL_RESULT_COUNT; r++) {
        if (results[r]) s->gives[streamed] |= 1u << r;
        const int wanted = r == MIL_LOGITS || (s->options.results >> r & 1) || (r == MIL_SLIDE_FEATS && !out->logits);
        s->node[streamed][r] = wanted ? results[r] : NULL;
        mil_node_keep(s->node[streamed][r]);
    }
}

// ---- what a stream needs of a plan ----
enum { MILI_STREAM_COLS = 64 };                            // values kept per instance, beside one per class
#define MILI_STREAM_MAX (INT64_C(1) << 48)                 // instances of a stream, so that sums of them cannot overflow

MILI_FN int mili_is_rows_of(const mil_node *n, int64_t rows)
{
    const mil_node *base = n->plan->base;
    return mili_main(base)->kind == MIL_KIND_ROWS && base->rows == rows;
}

MILI_FN void mili_scorer_refuse(mil_scorer *s, const mil_node *n, const char *why)
{
    snprintf(s->reason, sizeof s->reason, "%s cannot be streamed: %s%s%s %s; use mil_scorer_score", s->model->name, n ? n->layer : "", n && n->layer[0] ? ": " : "",
             n ? n->op->name : "the model", why);
}

// Records the model for `rows` instances of which nothing is known yet.
MILI_FN mil_status mili_scorer_record(mil_scorer *s, mil_tape *tape, int64_t rows, mil_outputs *out)
{
    mil_bag bag;
    memset(&bag, 0, sizeof bag);
    bag.features = mil_tensor_matrix(s->ctx, MIL_REAL_DTYPE, rows, mil_model_in_dim(s->model));        // any address: rows come later
    tape->stream_capacity = rows;
    if (mil_model_record(tape, s->model, &bag, NULL, out) == MIL_OK) return MIL_OK;
    return mili_fail(s->ctx, tape->status, "%s", tape->error);
}

// Whether a longer bag records the same ops with the same numbers: a factor 1/N, say, would be that of another bag in a stream.
MILI_FN int mili_scorer_any_length(mil_scorer *s, const mil_tape *tape)
{
    mil_tape *other = (mil_tape *)mili_alloc_zero(s->ctx, sizeof *other);
    mil_outputs out;
    const mil_node *bad = NULL;
    int same = 0;
    if (!other) return 0;
    other->ctx = s->ctx;
    other->layer_interned = "";
    if (mili_scorer_record(s, other, tape->stream_capacity + MILI_TILE_ROWS, &out) == MIL_OK) {
        same = other->count == tape->count;
        for (int64_t i = 0; same && i < tape->count; i++) {
            const mil_node *a = tape->node[i], *b = other->node[i];
            if (a->op == b->op && memcmp(a->r, b->r, sizeof a->r) == 0) continue;
            bad = a;
            same = 0;
        }
        if (!same) mili_scorer_refuse(s, bad, "depends on the number of instances");
    }
    mil_tape_free(other);
    return same;
}

// 1 when the recorded model can be streamed; else `reason` names the op in the way, unless there was no memory to find out.
MILI_FN int mili_scorer_streams(mil_scorer *s, const mil_tape *tape, const mili_plan *plan, const mil_node *features, int *at)
{
    const int64_t rows = tape->stream_capacity;
    const mil_node *bad = NULL;
    const char *why = "";
    *at = -1;
    for (int i = 0; i < plan->step_count && !bad; i++) {
        const mili_step *step = &plan->step[i];
        for (int k = 0; k < step->count && !bad; k++) {
            const mil_node *n = step->node[k];
            for (int j = 0; j < n->input_count && !bad; j++) {
                const mil_node *in = n->input[j];
                if (in->plan->base == features) {
                    if (!step->group || step->rows != rows || !(n->row_inputs >> j & 1) || in->rows != rows) { bad = n; why = "needs all instances at once"; }
                    else if (*at >= 0 && *at != i) { bad = n; why = "reads the instances a second time"; }
                    *at = i;
                } else if (in->plan->base->kind != MIL_KIND_LEAF && mili_is_rows_of(in, rows) && !mili_reads_rows(n, j)) {
                    bad = n;
                    why = "needs all instances at once";
                }
            }
            if (n->kind == MIL_KIND_WHOLE)
                for (int a = 0; a < n->rank && !bad; a++) if (n->shape[a] == rows) { bad = n; why = "needs the number of instances"; }
            if (!bad && step->group && step->rows == rows && n->kind == MIL_KIND_ROWS && n->plan->place == MILI_PLACE_FULL &&
                n->cols > MILI_STREAM_COLS + mil_model_num_classes(s->model)) { bad = n; why = "must be kept for every instance"; }
        }
    }
    if (!bad && *at >= 0) return mili_scorer_any_length(s, tape);
    mili_scorer_refuse(s, bad, bad ? why : "does not read the instances");
    return 0;
}

// Counts the changes of all weights: grows with each of them.
MILI_FN int64_t mili_model_version(const mil_model *model)
{
    int64_t version = 0;
    for (int64_t i = 0; i < model->param_count; i++) version += model->param[i]->version;
    return version;
}

// Room to sort the instances of a bag, where ranks will be asked for.
MILI_FN mil_status mili_scorer_order(mil_scorer *s, int64_t rows)
{
    if (!(s->options.results >> MIL_RANK & 1) || rows <= s->order_rows) return MIL_OK;
    int64_t *order = (int64_t *)mili_alloc(s->ctx, (size_t)rows * sizeof *order);
    if (!order) return s->ctx->status;
    mili_free(s->ctx, s->order, (size_t)s->order_rows * sizeof *order);
    s->order = order;
    s->order_rows = rows;
    return MIL_OK;
}

// Records the model for `capacity` instances and prepares the stream. On success the tape, plan and group replace the old ones.
MILI_FN mil_status mili_scorer_open(mil_scorer *s, int64_t capacity)
{
    mil_context *ctx = s->ctx;
    mil_tape *tape = NULL;
    mil_outputs out;
    mil_scorer old = *s;
    const int64_t D = mil_model_in_dim(s->model);
    capacity = (capacity + MILI_TILE_ROWS - 1) / MILI_TILE_ROWS * MILI_TILE_ROWS + 1;       // a length that no layer has by chance
    if (ctx->backend) {
        s->refused = 1;
        snprintf(s->reason, sizeof s->reason, "backend %s does not stream; use mil_scorer_score", ctx->backend->name);
        return MIL_OK;
    }
    tape = (mil_tape *)mili_alloc_zero(ctx, sizeof *tape);
    if (!tape) return ctx->status;
    tape->ctx = ctx;
    tape->layer_interned = "";
    if (mili_scorer_record(s, tape, capacity, &out) != MIL_OK) goto fail;
    mili_scorer_keep(s, &out, 1);
    {
        mili_plan *plan = NULL;
        int step;
        plan = mili_make_plan(tape);
        if (!plan) {
            if (ctx->status == MIL_OK) mili_fail(ctx, tape->status, "%s", tape->error);
            goto fail;
        }
        if (!mili_scorer_streams(s, tape, plan, out.features, &step)) {
            s->refused = ctx->status == MIL_OK;
            goto fail;
        }
        if (mili_scorer_order(s, capacity) != MIL_OK) goto fail;
        old.order = s->order;
        old.order_rows = s->order_rows;
        plan->memory = mili_take_workspace(tape, plan->bytes);
        if (!plan->memory || mili_bind(tape, plan) != MIL_OK) goto fail;
        size_t states = 0;
        for (int k = 0; k < plan->step[step].count; k++) states += plan->step[step].node[k]->plan->state_bytes * (size_t)plan->step[step].partitions;
        if (!s->stage) {
            s->stage_rows = MILI_MAX(ctx->threads, 1) * plan->step[step].tile_rows;
            s->stage = (mil_real *)mili_alloc(ctx, (size_t)(s->stage_rows * D) * sizeof(mil_real));
            if (!s->stage) goto fail;
        }
        if (!s->saved && states) {
            s->saved = (char *)mili_alloc(ctx, states);
            if (!s->saved) goto fail;
            s->saved_bytes = states;
        }
        for (int i = 0; i < step; i++) if (mili_run_step(tape, plan, &plan->step[i]) != MIL_OK) goto fail;
        s->tape = tape;
        s->plan = plan;
        s->step = step;
        s->features = out.features;
        s->capacity = capacity;
        s->version = mili_model_version(s->model);
        s->whole_waves = 0;
        for (int k = 0; k < plan->step[step].count; k++) {
            const mil_node *n = plan->step[step].node[k];
            for (int i = 0; i < n->input_count; i++) s->whole_waves |= n->plan->deferred && n->input[i]->plan->base == out.features;
        }
        mili_group_open(&s->group, tape, plan, &plan->step[step], plan->memory);
        mili_group_begin(&s->group);
        mili_plan_done(tape, plan);
    }
    if (old.tape) {                                        // what the smaller stream held
        const mili_step *from = &old.plan->step[old.step], *to = &s->plan->step[s->step];
        for (int k = 0; k < to->count; k++) {
            const mil_node *a = from->node[k], *b = to->node[k];
            if (b->plan->state_bytes) memcpy(b->plan->state, a->plan->state, b->plan->state_bytes * (size_t)to->partitions);
            if (b->kind == MIL_KIND_ROWS && b->plan->place == MILI_PLACE_FULL) memcpy(b->data, a->data, (size_t)s->fed * mili_row_bytes(b));
        }
        mil_tape_free(old.tape);
    }
    s->results_at = -1;
    return MIL_OK;
fail:
    mil_tape_free(tape);
    if (s->refused) memset((void *)s->node, 0, sizeof s->node);
    else {
        mil_real *stage = s->stage;
        char *saved = s->saved;
        const int64_t stage_rows = s->stage_rows;
        const size_t saved_bytes = s->saved_bytes;
        *s = old;
        s->stage = stage;
        s->stage_rows = stage_rows;
        s->saved = saved;
        s->saved_bytes = saved_bytes;
    }
    return ctx->status;
}

MILI_FN int mili_scorer_options_fit(mil_context *ctx, const mil_scorer_options *o, const char *call)
{
    if (o->capacity < 0 || o->capacity > MILI_STREAM_MAX)
        mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: options.capacity is %lld, not in 0..%lld", call, (long long)o->capacity, (long long)MILI_STREAM_MAX);
    else if (o->results >> MIL_RESULT_COUNT)
        mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: options.results is 0x%x; only the bits 1u << result of %d results may be set", call, o->results, (int)MIL_RESULT_COUNT);
    return ctx->status == MIL_OK;
}

MIL_DEF mil_scorer *mil_scorer_create(mil_model *model, const mil_scorer_options *options)
{
    if (!model) return NULL;
    mil_context *ctx = model->ctx;
    mili_enter(ctx);
    mil_scorer *s = (mil_scorer *)mili_alloc_zero(ctx, sizeof *s);
    if (!s) return NULL;
    s->ctx = ctx;
    s->model = model;
    s->options = options ? *options : mil_scorer_options_default();
    s->results_at = -1;
    s->streamed = 1;
    if (mili_scorer_options_fit(ctx, &s->options, "mil_scorer_create")) mili_scorer_open(s, MILI_MAX(s->options.capacity, 1024));
    if (ctx->status != MIL_OK) {
        mil_scorer_free(s);
        return NULL;
    }
    return s;
}

MIL_DEF void mil_scorer_free(mil_scorer *s)
{
    if (!s) return;
    mil_tape_free(s->tape);
    mil_tape_free(s->whole);
    mili_free(s->ctx, s->stage, (size_t)(s->stage_rows * mil_model_in_dim(s->model)) * sizeof(mil_real));
    mili_free(s->ctx, s->saved, s->saved_bytes);
    mili_free(s->ctx, s->order, (size_t)s->order_rows * sizeof *s->order);
    mili_free(s->ctx, s, sizeof *s);
}

MIL_DEF size_t mil_scorer_bytes(mil_model *model, const mil_scorer_options *options, int64_t instances)
{
    if (!model) return 0;
    mil_context *ctx = model->ctx;
    mili_enter(ctx);
    if (instances < 1 || instances > MILI_STREAM_MAX) {
        mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_bytes: instances is %lld, not in 1..%lld", (long long)instances, (long long)MILI_STREAM_MAX);
        return 0;
    }
    const mil_scorer_options wanted = options ? *options : mil_scorer_options_default();
    if (!mili_scorer_options_fit(ctx, &wanted, "mil_scorer_bytes")) return 0;
    const size_t before = ctx->bytes;
    const int64_t blocks_before = ctx->blocks;
    size_t bytes = 0;
    mil_scorer *s = (mil_scorer *)mili_alloc_zero(ctx, sizeof *s);
    mil_tape *tape = NULL;
    if (!s || mil_tape_create(ctx, &tape) != MIL_OK ||
        !mili_reserve(ctx, (void **)&tape->workspace, &tape->workspace_capacity, 1, sizeof *tape->workspace)) {
        mil_tape_free(tape);
        mili_free(ctx, s, s ? sizeof *s : 0);
        return 0;
    }
    s->ctx = ctx;
    s->model = model;
    s->options = wanted;
    const int64_t D = mil_model_in_dim(model);
    int64_t rows = MILI_MAX(MILI_MAX(instances, s->options.capacity), 1024);
    mil_outputs out;
    for (int stream = !ctx->backend; stream >= 0 && !bytes; stream--) {        // as a stream if it can be one, else as a bag
        mil_tape_reset(tape);
        rows = stream ? (rows + MILI_TILE_ROWS - 1) / MILI_TILE_ROWS * MILI_TILE_ROWS + 1 : instances;
        if (mili_scorer_record(s, tape, rows, &out) != MIL_OK) break;
        if (!stream) tape->stream_capacity = 0;
        mili_scorer_keep(s, &out, stream);
        mili_plan *plan = mili_make_plan(tape);
        if (!plan) break;
        int step;
        if (stream && !mili_scorer_streams(s, tape, plan, out.features, &step)) {
            if (ctx->status != MIL_OK) break;
            continue;
        }
        // A block costs its alignment twice at most: in front of it, and in the pieces of a fixed block. 4: workspace, stage, states, order.
        bytes = ctx->bytes - before + plan->bytes + (size_t)(ctx->blocks - blocks_before + 4) * 2 * MILI_ALIGN;
        if (wanted.results >> MIL_RANK & 1) bytes += (size_t)rows * sizeof *s->order;
        if (!stream) break;
        bytes += (size_t)(MILI_MAX(ctx->threads, 1) * plan->step[step].tile_rows * D) * sizeof(mil_real);
        for (int k = 0; k < plan->step[step].count; k++) bytes += plan->step[step].node[k]->plan->state_bytes * (size_t)plan->step[step].partitions;
    }
    mil_tape_free(tape);
    mili_free(ctx, s, sizeof *s);
    return bytes;
}

MIL_DEF int64_t mil_scorer_instances(const mil_scorer *s)
{
    if (!s) return 0;
    return s->streamed ? s->fed + s->staged : s->results_at < 0 ? 0 : s->whole_rows;
}

MIL_DEF void mil_scorer_reset(mil_scorer *s)
{
    if (!s) return;
    s->streamed = 1;
    s->scored = 0;
    s->fed = s->staged = 0;
    s->results_at = -1;
    if (!s->tape) return;
    const mili_step *step = &s->plan->step[s->step];
    mili_frame f;
    for (int k = 0; k < step->count; k++) {                // empty states; the packed weights stay
        const mil_node *n = step->node[k];
        if (n->kind != MIL_KIND_REDUCE || n->plan->deferred) continue;
        for (int p = 0; p < step->partitions; p++) {
            mili_frame_set(&f, s->ctx, n, 0, 0, NULL, 0);
            f.x.state = n->plan->state + (size_t)p * n->plan->state_bytes;
            n->op->begin(&f.x);
        }
    }
}

// Before rows or results: after a change of weights an empty stream packs them again; one with rows would mix two models.
MILI_FN mil_status mili_scorer_renew(mil_scorer *s, const char *call)
{
    const int64_t version = mili_model_version(s->model);
    if (version == s->version) return MIL_OK;
    if (s->fed + s->staged > 0)
        return mili_fail(s->ctx, MIL_ERROR_STATE, "%s: the model's weights changed after the first rows of this bag; mil_scorer_reset begins it again", call);
    for (int i = 0; i < s->step; i++) if (mili_run_step(s->tape, s->plan, &s->plan->step[i]) != MIL_OK) return s->ctx->status;
    mili_group_begin(&s->group);
    s->version = version;
    return MIL_OK;
}

// Copies the states to `saved`, or back.
MILI_FN void mili_scorer_states(mil_scorer *s, int back)
{
    const mili_step *step = &s->plan->step[s->step];
    char *at = s->saved;
    for (int k = 0; k < step->count; k++) {
        const mili_plan_node *p = step->node[k]->plan;
        const size_t bytes = p->state_bytes * (size_t)step->partitions;
        if (!bytes) continue;
        if (back) memcpy(p->state, at, bytes); else memcpy(at, p->state, bytes);
        at += bytes;
    }
}

// Feeds rows [s->fed, s->fed + count) that stand at `rows`, packed.
MILI_FN void mili_scorer_feed(mil_scorer *s, const mil_real *rows, int64_t count)
{
    mil_tensor *t = mili_input_tensor(s->features);
    memcpy(&t->data, &rows, sizeof rows);
    s->features->data = t->data;
    s->features->plan->row_base = s->fed;
    mili_group_rows(&s->group, s->fed, s->fed + count);
}

// Feeds `count` rows, a multiple of the tile or the last of the bag, from the caller's memory. Returns the first that is not finite, -1: all are; the
// states are then to be put back. Uses the stage, which must be empty, unless the rows can be read where they stand.
MILI_FN int64_t mili_scorer_feed_from(mil_scorer *s, const char *data, int64_t count, size_t stride, mil_dtype dtype)
{
    mili_rows r;
    int64_t bad = -1;
    r.node = s->features;
    r.data = data;
    r.stride = stride;
    r.dtype = dtype;
    r.direct = dtype == MIL_REAL_DTYPE && stride == (size_t)s->features->cols * sizeof(mil_real) && (uintptr_t)data % sizeof(mil_real) == 0;
    r.tiles = s->stage;
    r.first = s->fed;
    for (int p = 0; p < MILI_PARTITIONS; p++) r.bad[p] = -1;
    s->group.rows = &r;
    mili_scorer_feed(s, (const mil_real *)(const void *)data, count);
    s->group.rows = NULL;
    for (int p = 0; p < MILI_PARTITIONS; p++) if (r.bad[p] >= 0 && (bad < 0 || r.bad[p] < bad)) bad = r.bad[p];
    return bad < 0 ? -1 : bad - r.first;
}

// whole: these rows are all of the bag, so that its last tile may be short and runs beside the others.
MILI_FN mil_status mili_scorer_push(mil_scorer *s, const void *rows, int64_t count, size_t stride, mil_dtype dtype, int whole)
{
    mil_context *ctx = s->ctx;
    const int64_t D = mil_model_in_dim(s->model);
    const size_t packed = (size_t)D * mil_dtype_size(dtype);
    if (count < 0) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_push: count is %lld", (long long)count);
    if (count && !rows) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_push: rows is NULL and count %lld", (long long)count);
    if (packed == 0) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_push: %d is no dtype", (int)dtype);
    if (stride && stride < packed)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_push: stride %llu is below the %llu bytes of a row of %lld %s", (unsigned long long)stride,
                         (unsigned long long)packed, (long long)D, mil_dtype_name(dtype));
    if (s->refused) return mili_fail(ctx, MIL_ERROR_UNSUPPORTED, "%s", s->reason);
    if (!s->streamed || s->scored) mil_scorer_reset(s);
    if (count > MILI_STREAM_MAX - s->fed - s->staged)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_push: count is %lld after %lld rows; a stream takes %lld", (long long)count,
                         (long long)(s->fed + s->staged), (long long)MILI_STREAM_MAX);
    if (mili_scorer_renew(s, "mil_scorer_push") != MIL_OK) return ctx->status;
    const int64_t total = s->fed + s->staged + count;
    if (total > s->capacity && mili_scorer_open(s, MILI_MAX(total, 2 * s->capacity)) != MIL_OK) return ctx->status;
    if (count == 0) return MIL_OK;
    if (!stride) stride = packed;

    const mili_kernels *K = ctx->kernels;
    const int64_t tile = s->plan->step[s->step].tile_rows, fed = s->fed, staged = s->staged;
    const char *src = (const char *)rows;
    const int direct = dtype == MIL_REAL_DTYPE && stride == packed && (uintptr_t)rows % sizeof(mil_real) == 0;
    int64_t bad = -1, done = 0;
    int saved = 0;                                         // tiles are taken back by their states, staged rows by counting
    while (done < count && bad < 0) {
        const char *from = src + (size_t)done * stride;
        if (s->staged == 0 && (count - done >= tile || whole) && (direct || !s->whole_waves)) {
            const int64_t n = whole ? count - done : (count - done) / tile * tile;
            if (!saved++) mili_scorer_states(s, 0);
            bad = mili_scorer_feed_from(s, from, n, stride, dtype);
            if (bad >= 0) { bad += done; break; }
            s->fed += n;
            done += n;
            continue;
        }
        // Rows that fill a tile up, or are too few for one. The stage's own rows stay until all others are known to be fine.
        const int64_t n = MILI_MIN(count - done, tile - s->staged);
        for (int64_t r = 0; r < n && bad < 0; r++) {
            mil_real *to = s->stage + (s->staged + r) * D;
            mili_convert(K, to, from + (size_t)r * stride, dtype, D);
            if (!K->finite(to, D)) bad = done + r;
        }
        if (bad >= 0) break;
        done += n;
        s->staged += n;
        if (s->staged < tile) continue;
        for (int64_t r = done; r < count && staged && fed == s->fed && bad < 0; r++) {
            mil_real one[64];
            for (int64_t c = 0; c < D && bad < 0; c += 64) {
                const int64_t m = MILI_MIN(64, D - c);
                mili_convert(K, one, src + (size_t)r * stride + (size_t)c * mil_dtype_size(dtype), dtype, m);
                if (!K->finite(one, m)) bad = r;
            }
        }
        if (bad >= 0) break;
        if (!saved++) mili_scorer_states(s, 0);
        mili_scorer_feed(s, s->stage, tile);
        s->fed += tile;
        s->staged = 0;
    }
    if (bad >= 0) {
        if (saved) mili_scorer_states(s, 1);
        s->fed = fed;
        s->staged = staged;
        return mili_fail(ctx, MIL_ERROR_NUMERIC, "mil_scorer_push: row %lld of this call holds NaN or infinity", (long long)bad);
    }
    s->results_at = -1;
    return MIL_OK;
}

MIL_DEF mil_status mil_scorer_push(mil_scorer *s, const void *rows, int64_t count, size_t stride, mil_dtype dtype)
{
    if (!s) return MIL_ERROR_ARGUMENT;
    mili_enter(s->ctx);
    return mili_scorer_push(s, rows, count, stride, dtype, 0);
}

MILI_FN mil_node *mili_scorer_node(mil_scorer *s, mil_result result)
{
    if ((unsigned)result >= (unsigned)MIL_RESULT_COUNT) return NULL;
    return s->node[s->streamed][result == MIL_PROBABILITIES ? MIL_LOGITS : result];
}

// Elements of a result for the rows so far.
MILI_FN int64_t mili_scorer_count(mil_scorer *s, const mil_node *n)
{
    if (!n || mil_scorer_instances(s) == 0) return 0;
    if (!s->streamed || !mili_is_rows_of(n, s->capacity)) return n->count;
    return n->count / s->capacity * (s->fed + s->staged);
}

// The first `count` numbers of a result, where the host can read them: in place, or in *copy, which is then the caller's. NULL after
// an error.
MILI_FN const mil_real *mili_scorer_values(mil_scorer *s, const mil_node *n, int64_t count, mil_real **copy)
{
    mil_context *ctx = s->ctx;
    const size_t bytes = (size_t)count * sizeof **copy;
    const mil_real *x = (const mil_real *)(n->plan->base->kind == MIL_KIND_LEAF ? n->data : n->plan->base->data);
    *copy = NULL;
    if (ctx->backend) ctx->backend->synchronize(ctx->backend_self);
    if (mili_host_memory(ctx)) return x;
    *copy = (mil_real *)mili_alloc(ctx, bytes);
    if (*copy && mili_download(ctx, *copy, x, bytes) == MIL_OK) return *copy;
    mili_free(ctx, *copy, bytes);
    return *copy = NULL;
}

// Logits that are not finite are no answer. They come of weights that make numbers overflow, and of models that look at features
// which the mask hides.
MILI_FN mil_status mili_scorer_check(mil_scorer *s, const char *call)
{
    mil_node *n = mili_scorer_node(s, MIL_LOGITS);
    const int64_t count = s->streamed ? mili_scorer_count(s, n) : n ? n->count : 0;
    mil_real *copy;
    if (!n) return MIL_OK;
    const mil_real *x = mili_scorer_values(s, n, count, &copy);
    if (x && !s->ctx->kernels->finite(x, count))
        mili_fail(s->ctx, MIL_ERROR_NUMERIC, "%s: the logits are NaN or infinite though the features are not: weights too large, or features that %s does not mask",
                  call, s->model->arch->name);
    mili_free(s->ctx, copy, (size_t)count * sizeof *copy);
    return s->ctx->status;
}

// Results for the rows so far, into the workspace.
MILI_FN mil_status mili_scorer_finish(mil_scorer *s, const char *call)
{
    mil_context *ctx = s->ctx;
    const int64_t rows = s->fed + s->staged;
    if (s->results_at == rows) return MIL_OK;
    if (rows == 0) return mili_fail(ctx, MIL_ERROR_STATE, "%s: no instance has been pushed", call);
    if (mili_scorer_renew(s, call) != MIL_OK) return ctx->status;
    mili_scorer_states(s, 0);
    if (s->staged) mili_scorer_feed(s, s->stage, s->staged);
    mili_group_finish(&s->group, rows);
    s->tape->stream_rows = rows;
    for (int i = s->step + 1; i < s->plan->step_count && ctx->status == MIL_OK; i++) mili_run_step(s->tape, s->plan, &s->plan->step[i]);
    mili_scorer_states(s, 1);
    if (ctx->status == MIL_OK && mili_scorer_check(s, call) == MIL_OK) s->results_at = rows;
    return ctx->status;
}

MIL_DEF mil_status mil_scorer_score(mil_scorer *s, const mil_bag *bag)
{
    if (!s) return MIL_ERROR_ARGUMENT;
    mil_context *ctx = s->ctx;
    mili_enter(ctx);
    if (!bag) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_score: bag is NULL");
    const mil_tensor *f = &bag->features;
    const int64_t D = mil_model_in_dim(s->model);
    int64_t stride[MIL_MAX_RANK];
    const int one = mil_tensor_count(f) >= 0 && f->data && (f->rank == 2 || (f->rank == 3 && f->shape[0] == 1)) && f->shape[f->rank - 1] == D && f->shape[f->rank - 2] > 0;
    if (one) mili_tensor_strides(f, stride);
    if (!s->refused && one && !bag->mask.data && !bag->extra_count && (!bag->coords.data || mil_tensor_count(&bag->coords) == 2 * f->shape[f->rank - 2]) && stride[f->rank - 1] == (int64_t)mil_dtype_size(f->dtype) &&
        (stride[f->rank - 2] >= D * (int64_t)mil_dtype_size(f->dtype) || f->shape[f->rank - 2] == 1)) {
        mil_scorer_reset(s);
        const int64_t n = f->shape[f->rank - 2];
        mil_status status = mili_scorer_push(s, f->data, n, n == 1 ? 0 : (size_t)stride[f->rank - 2], f->dtype, 1);
        if (status == MIL_OK) status = mili_scorer_finish(s, "mil_scorer_score");          // now, so that the results are of the present weights
        s->scored = 1;
        return status;
    }
    mil_outputs out;
    if (!s->whole && mil_tape_create(ctx, &s->whole) != MIL_OK) return ctx->status;
    mil_tape_reset(s->whole);
    s->streamed = 0;
    s->results_at = -1;
    s->gives[0] = 0;
    memset((void *)s->node[0], 0, sizeof s->node[0]);
    if (mil_tensor_count(f) >= 0 && f->rank > 1 && mili_scorer_order(s, f->shape[f->rank - 2]) != MIL_OK) return ctx->status;
    if (mil_model_record(s->whole, s->model, bag, NULL, &out) == MIL_OK) {
        const int64_t bad = mili_bag_not_finite(ctx, bag);
        if (bad >= 0) return mili_fail(ctx, MIL_ERROR_NUMERIC, "mil_scorer_score: row %lld of the features holds NaN or infinity", (long long)bad);
        mili_scorer_keep(s, &out, 0);
    }
    if (mil_tape_run(s->whole) != MIL_OK || mili_scorer_check(s, "mil_scorer_score") != MIL_OK) return ctx->status;
    s->results_at = 0;
    s->whole_rows = f->shape[f->rank - 2];
    return MIL_OK;
}

MIL_DEF int64_t mil_scorer_count(mil_scorer *s, mil_result result) { return s ? mili_scorer_count(s, mili_scorer_node(s, result)) : 0; }

typedef struct mili_rank_keys { const mil_real *x; int64_t step; } mili_rank_keys;

MILI_FN int mili_rank_compare(const void *arg, int64_t a, int64_t b)
{
    const mili_rank_keys *keys = (const mili_rank_keys *)arg;
    const mil_real x = keys->x[a * keys->step], y = keys->x[b * keys->step];
    return (x > y) - (x < y);
}

// Ranks of column k of x [N, K] among the M instances that are not masked: place / (M - 1), equal values share their mean place.
MILI_FN void mili_rank_column(const mil_real *x, int64_t N, int64_t K, int64_t k, int64_t *order, mil_real *dst, double *wide)
{
    const mili_rank_keys keys = { x + k, K };
    int64_t M = 0;
    for (int64_t n = 0; n < N; n++) {
        if (x[n * K + k] > -MILI_REAL_MAX) order[M++] = n;
        else if (wide) wide[n * K + k] = 0;
        else dst[n * K + k] = 0;
    }
    mili_index_sort(order, M, mili_rank_compare, &keys);
    for (int64_t i = 0, j; i < M; i = j) {
        for (j = i + 1; j < M && x[order[j] * K + k] == x[order[i] * K + k]; j++) {}
        const double rank = M > 1 ? 0.5 * (double)(i + j - 1) / (double)(M - 1) : 1;
        for (int64_t m = i; m < j; m++) {
            if (wide) wide[order[m] * K + k] = rank;
            else dst[order[m] * K + k] = (mil_real)rank;
        }
    }
}

// Softmax of a row of C logits in double; C = 1: sigmoid.
MILI_FN void mili_probabilities_f64(double *p, const mil_real *x, int64_t C)
{
    double top = C > 1 ? (double)x[0] : 0, sum = 0;
    for (int64_t c = 1; c < C; c++) top = MILI_MAX(top, (double)x[c]);
    for (int64_t c = 0; c < C; c++) sum += p[c] = C > 1 ? exp((double)x[c] - top) : 1 / (1 + exp(-(double)x[c]));
    for (int64_t c = 0; c < C && C > 1; c++) p[c] /= sum;
}

// Into dst, or into wide where that is not NULL.
MILI_FN mil_status mili_scorer_read(mil_scorer *s, mil_result result, mil_real *dst, double *wide, int64_t count)
{
    mil_context *ctx = s->ctx;
    if ((unsigned)result >= (unsigned)MIL_RESULT_COUNT) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_read: %d is no result", (int)result);
    if (s->streamed ? s->refused : s->results_at < 0) return mili_fail(ctx, MIL_ERROR_STATE, "mil_scorer_read: no bag has been scored");
    if (s->streamed && mili_scorer_finish(s, "mil_scorer_read") != MIL_OK) return ctx->status;
    mil_node *n = mili_scorer_node(s, result);
    if (!n && (s->gives[s->streamed] >> result & 1))
        return mili_fail(ctx, MIL_ERROR_STATE, "mil_scorer_read: %s was not asked for; set its bit in mil_scorer_options.results", mil_result_name(result));
    if (!n) return mili_fail(ctx, MIL_ERROR_UNSUPPORTED, "mil_scorer_read: %s gives no %s", s->model->name, mil_result_name(result));
    const int64_t have = mili_scorer_count(s, n);
    if (count != have)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_read: %s has %lld elements, not %lld", mil_result_name(result), (long long)have, (long long)count);
    if (!dst && !wide) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "mil_scorer_read: dst is NULL");

    mil_real *copy;
    const mil_real *x = mili_scorer_values(s, n, count, &copy);
    if (!x) return ctx->status;
    if (result == MIL_RANK) {
        const int64_t N = mil_scorer_instances(s), K = n->cols;
        for (int64_t at = 0; at < count; at += N * K)
            for (int64_t k = 0; k < K; k++) mili_rank_column(x + at, N, K, k, s->order, dst ? dst + at : NULL, wide ? wide + at : NULL);
    } else if (result == MIL_PROBABILITIES) {
        const int64_t C = n->cols;
        for (int64_t at = 0; at < count; at += C) {
            if (wide) mili_probabilities_f64(wide + at, x + at, C);
            else if (C == 1) ctx->kernels->sigmoid(dst + at, x + at, 1);
            else mili_softmax_row(ctx->kernels, dst + at, x + at, C);
        }
    } else if (wide) {
        for (int64_t i = 0; i < count; i++) wide[i] = (double)x[i];
    } else memcpy(dst, x, (size_t)count * sizeof *dst);
    mili_free(ctx, copy, (size_t)count * sizeof *copy);
    return ctx->status;
}

MIL_DEF mil_status mil_scorer_read(mil_scorer *s, mil_result result, mil_real *dst, int64_t count)
{
    if (!s) return MIL_ERROR_ARGUMENT;
    mili_enter(s->ctx);
    return mili_scorer_read(s, result, dst, NULL, count);
}

MIL_DEF mil_status mil_scorer_read_f64(mil_scorer *s, mil_result result, double *dst, int64_t count)
{
    if (!s) return MIL_ERROR_ARGUMENT;
    mili_enter(s->ctx);
    return mili_scorer_read(s, result, NULL, dst, count);
}

// ---- self-test ----
enum { MILI_TEST_N = 300, MILI_TEST_D = 32, MILI_TEST_E = 16, MILI_TEST_A = 8, MILI_TEST_C = 3 };

// The bag: numbers that every float type holds exactly.
MILI_FN void mili_test_bag(float *x)
{
    for (int i = 0; i < MILI_TEST_N; i++)
        for (int j = 0; j < MILI_TEST_D; j++) x[i * MILI_TEST_D + j] = (float)((i * 37 + j * 101 + i * j) % 61 - 30) / 16;
}

// y [out] = W x + b in double, W [out, in]
MILI_FN void mili_test_linear(const mil_model *model, const char *key, const double *x, int in, int out, double *y)
{
    char name[64];
    snprintf(name, sizeof name, "%s.weight", key);
    const mil_param *w = mil_model_find(model, name);
    snprintf(name, sizeof name, "%s.bias", key);
    const mil_param *b = mil_model_find(model, name);
    for (int o = 0; o < out; o++) {
        y[o] = (double)((const mil_real *)b->data)[o];
        for (int i = 0; i < in; i++) y[o] += (double)((const mil_real *)w->data)[o * in + i] * x[i];
    }
}

// The logits of abmil by its equations, one instance at a time.
MILI_FN void mili_test_reference(const mil_model *model, const float *x, double *logits)
{
    double row[MILI_TEST_D], h[MILI_TEST_E], v[MILI_TEST_A], u[MILI_TEST_A], score, z[MILI_TEST_E], top = -1e300, sum = 0;
    memset(z, 0, sizeof z);
    for (int n = 0; n < MILI_TEST_N; n++) {
        for (int j = 0; j < MILI_TEST_D; j++) row[j] = (double)x[n * MILI_TEST_D + j];
        mili_test_linear(model, "patch_embed.0", row, MILI_TEST_D, MILI_TEST_E, h);
        for (int e = 0; e < MILI_TEST_E; e++) h[e] = h[e] > 0 ? h[e] : 0;
        mili_test_linear(model, "global_attn.attention_a.0", h, MILI_TEST_E, MILI_TEST_A, v);
        mili_test_linear(model, "global_attn.attention_b.0", h, MILI_TEST_E, MILI_TEST_A, u);
        for (int a = 0; a < MILI_TEST_A; a++) v[a] = tanh(v[a]) / (1 + exp(-u[a]));
        mili_test_linear(model, "global_attn.attention_c", v, MILI_TEST_A, 1, &score);
        const double fade = score > top ? exp(top - score) : 1, weight = score > top ? 1 : exp(score - top);
        for (int e = 0; e < MILI_TEST_E; e++) z[e] = z[e] * fade + weight * h[e];
        sum = sum * fade + weight;
        if (score > top) top = score;
    }
    for (int e = 0; e < MILI_TEST_E; e++) z[e] /= sum;
    mili_test_linear(model, "classifier", z, MILI_TEST_E, MILI_TEST_C, logits);
}

// Scores the bag in pushes of `first` and the rest (0: whole).
MILI_FN mil_status mili_test_score(mil_model *model, const float *x, int64_t first, mil_real *logits)
{
    mil_scorer *s = mil_scorer_create(model, NULL);
    if (!s) return model->ctx->status;
    const mil_bag bag = mil_bag_make(x, MILI_TEST_N, MILI_TEST_D);
    if (first ? mil_scorer_push(s, x, first, 0, MIL_F32) == MIL_OK && mil_scorer_push(s, x + first * MILI_TEST_D, MILI_TEST_N - first, 0, MIL_F32) == MIL_OK
              : mil_scorer_score(s, &bag) == MIL_OK)
        mil_scorer_read(s, MIL_LOGITS, logits, MILI_TEST_C);
    mil_scorer_free(s);
    return model->ctx->status;
}

MIL_DEF mil_status mil_selftest(mil_context *ctx)
{
    static const double stored[MILI_TEST_C] = { 3.01282810, 0.93454037, 0.18427203 };
    const size_t bag_bytes = MILI_TEST_N * MILI_TEST_D * sizeof(float);
    const double tolerance = ctx && ctx->precision == MIL_PRECISION_BF16 ? 2e-2 : MIL_REAL_IS_FLOAT ? 2e-5 : 1e-10;
    mil_real whole[MILI_TEST_C], other[MILI_TEST_C];
    double reference[MILI_TEST_C];
    size_t size = 0;
    void *file = NULL;
    mil_model *copy = NULL;
    if (!ctx) return MIL_ERROR_ARGUMENT;
    mil_model *model = mil_create(ctx, "abmil", "in_dim=32 embed_dim=16 attn_dim=8 num_classes=3");
    if (!model) return ctx->status;
    float *x = (float *)mili_alloc(ctx, bag_bytes);
    if (!x || mil_model_init(model, 1) != MIL_OK) goto done;
    if (!mili_host_memory(ctx)) {                          // the plain loop reads the weights where they are
        mili_fail(ctx, MIL_ERROR_UNSUPPORTED, "self-test: backend %s keeps its own memory; test a context of the CPU", ctx->backend->name);
        goto done;
    }
    mili_test_bag(x);
    mili_test_reference(model, x, reference);
    if (mili_test_score(model, x, 0, whole) != MIL_OK) goto done;
    for (int c = 0; c < MILI_TEST_C; c++) {
        const double off = fabs(reference[c] - stored[c]), err = fabs((double)whole[c] - reference[c]);
        if (!mili_is_finite_f64(off) || off > 1e-6) { mili_fail(ctx, MIL_ERROR_NUMERIC, "self-test: weights or libm: logit %d is %.9g, not %.9g", c, reference[c], stored[c]); goto done; }
        if (!mili_is_finite(whole[c]) || err > tolerance) {
            mili_fail(ctx, MIL_ERROR_NUMERIC, "self-test: kernels %s: logit %d is %.9g, not %.9g", mil_context_cpu(ctx), c, (double)whole[c], reference[c]);
            goto done;
        }
    }
    for (int64_t first = 1; first < MILI_TEST_N; first += 113) {
        if (mili_test_score(model, x, first, other) != MIL_OK) goto done;
        if (memcmp(whole, other, sizeof whole) != 0) { mili_fail(ctx, MIL_ERROR_NUMERIC, "self-test: a stream cut at %lld gives other bits than the bag", (long long)first); goto done; }
    }
    if (mil_save_memory(model, NULL, &size) != MIL_OK || !(file = mili_alloc(ctx, size)) || mil_save_memory(model, file, &size) != MIL_OK) goto done;
    copy = mil_open_memory(ctx, file, size);
    if (!copy || mili_test_score(copy, x, 0, other) != MIL_OK) goto done;
    if (memcmp(whole, other, sizeof whole) != 0) mili_fail(ctx, MIL_ERROR_NUMERIC, "self-test: weights written and read again give other logits");
done:
    mil_model_free(copy);
    mili_free(ctx, file, size);
    mili_free(ctx, x, bag_bytes);
    mil_model_free(model);
    return ctx->status;
}

#ifndef MIL_NO_METRICS
// ==== >>metric-code: metrics ======================================================================================
// Every metric is written once, for bags that count w[i] times (w NULL: once each). A bootstrap resample is then nothing but
// other counts, and the scores are sorted once for all resamples.

#define MILI_METRIC_NAN ((double)NAN)                      // a value that the data leave undefined

static const struct { const char *name; int sign; const char *meaning; } mili_metric_table[MIL_METRIC_COUNT] = {
#define MILI_X(NAME, member, sign, meaning) { #member, sign, meaning },
    MIL_METRIC_LIST(MILI_X)
#undef MILI_X
};

MILI_FN int mili_metric_exists(mil_metric which) { return (unsigned)which < (unsigned)MIL_METRIC_COUNT; }

MIL_DEF const char *mil_metric_name(mil_metric which)
{
    return mili_metric_exists(which) ? mili_metric_table[which].name : NULL;
}

MIL_DEF const char *mil_metric_meaning(mil_metric which)
{
    return mili_metric_exists(which) ? mili_metric_table[which].meaning : NULL;
}

MIL_DEF int mil_metric_sign(mil_metric which) { return mili_metric_exists(which) ? mili_metric_table[which].sign : 0; }

MIL_DEF double mil_metric_value(const mil_metrics *m, mil_metric which)
{
    if (m) switch (which) {
#define MILI_X(NAME, member, sign, meaning) case MIL_METRIC_##NAME: return m->member;
    MIL_METRIC_LIST(MILI_X)
#undef MILI_X
    case MIL_METRIC_COUNT: break;
    }
    return MILI_METRIC_NAN;
}

MIL_DEF mil_metric mil_metric_find(const char *name)
{
    int i = 0;
    while (i < (int)MIL_METRIC_COUNT && (!name || strcmp(name, mili_metric_table[i].name) != 0)) i++;
    return (mil_metric)i;
}

// ---- what comes in is checked here, once -----------------------------------------------------------

MILI_FN mil_status mili_metric_sizes(mil_context *ctx, const char *what, const void *a, const void *b, const void *out,
                                     int64_t n, int64_t C, int64_t least_classes)
{
    size_t cells;
    if (!a || !b || !out) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: a NULL array or result", what);
    if (C < least_classes)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: %lld classes, at least %lld needed", what, (long long)C,
                         (long long)least_classes);
    if (n < 1) return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: nothing to measure (n = %lld)", what, (long long)n);
    if ((uint64_t)n > SIZE_MAX || (uint64_t)C > SIZE_MAX || !mili_mul_size((size_t)n, (size_t)C, &cells) ||
        !mili_mul_size(cells, 8 * sizeof(double), &cells))
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: [%lld, %lld] is too large", what, (long long)n, (long long)C);
    return MIL_OK;
}

MILI_FN mil_status mili_metric_labels(mil_context *ctx, const char *what, const int64_t *labels, int64_t n, int64_t classes)
{
    for (int64_t i = 0; i < n; i++)
        if (labels[i] < 0 || labels[i] >= classes)
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: label %lld of bag %lld is outside 0..%lld", what,
                             (long long)labels[i], (long long)i, (long long)(classes - 1));
    return MIL_OK;
}

MILI_FN mil_status mili_metric_scores(mil_context *ctx, const char *what, const double *scores, int64_t n, int64_t C,
                                      int finite)
{
    for (int64_t i = 0; i < n * C; i++) {
        if (scores[i] != scores[i])
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: bag %lld has a score that is not a number", what,
                             (long long)(i / C));
        if (finite && scores[i] - scores[i] != 0)
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: bag %lld has an infinite score", what, (long long)(i / C));
    }
    return MIL_OK;
}

MILI_FN mil_status mili_metric_probabilities(mil_context *ctx, const char *what, const double *p, int64_t n, int64_t C)
{
    mil_status status = mili_metric_scores(ctx, what, p, n, C, 0);
    for (int64_t i = 0; status == MIL_OK && i < n; i++, p += C) {
        double sum = 0;
        for (int64_t c = 0; c < C; c++) {
            if (!(p[c] >= 0 && p[c] <= 1 + 1e-6))
                return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: bag %lld has probability %g, not in 0..1 (is it a logit?)",
                                 what, (long long)i, p[c]);
            sum += p[c];
        }
        if (C > 1 && !(fabs(sum - 1) <= 0.01))
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: the probabilities of bag %lld sum to %g, not 1", what,
                             (long long)i, sum);
    }
    return status;
}

// p [C] of one bag -> the probability of class c; one column is class 1's.
MILI_FN double mili_metric_probability(const double *p, int64_t C, int64_t c) { return C > 1 ? p[c] : c ? p[0] : 1 - p[0]; }

MILI_FN int64_t mili_metric_argmax(const double *p, int64_t C)
{
    int64_t best = 0;
    if (C == 1) return p[0] > 0.5;
    for (int64_t c = 1; c < C; c++)
        if (p[c] > p[best]) best = c;
    return best;
}

// order [n]: 0..n-1 by ascending key[i * stride], equal keys in the order of their index. Merge sort from the bottom up:
// stable, no recursion, n log n whatever the data. spare [n].
MILI_FN void mili_metric_sort(const double *key, int64_t stride, int64_t n, int64_t *order, int64_t *spare)
{
    int64_t *from = order, *to = spare;
    for (int64_t i = 0; i < n; i++) order[i] = i;
    for (int64_t width = 1; width < n; width = width > n / 2 ? n : 2 * width) {
        for (int64_t start = 0; start < n; ) {
            const int64_t middle = n - start > width ? start + width : n;
            const int64_t end = n - middle > width ? middle + width : n;
            int64_t a = start, b = middle;
            for (int64_t k = start; k < end; k++)
                to[k] = b >= end || (a < middle && key[from[a] * stride] <= key[from[b] * stride]) ? from[a++] : from[b++];
            start = end;
        }
        int64_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != order) memcpy(order, from, (size_t)n * sizeof *order);
}

// ---- the confusion matrix and what follows from it -------------------------------------------------

MIL_DEF mil_status mil_metric_predict(mil_context *ctx, const double *scores, int64_t n, int64_t C, int64_t *predicted)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_metric_sizes(ctx, "predict", scores, scores, predicted, n, C, 1);
    if (status == MIL_OK) status = mili_metric_scores(ctx, "predict", scores, n, C, 0);
    for (int64_t i = 0; status == MIL_OK && i < n; i++) predicted[i] = mili_metric_argmax(scores + i * C, C);
    return status;
}

MILI_FN void mili_confusion(const int64_t *predicted, const int64_t *labels, const int64_t *w, int64_t n, int64_t C,
                            int64_t *confusion)
{
    for (int64_t i = 0; i < C * C; i++) confusion[i] = 0;
    for (int64_t i = 0; i < n; i++) confusion[labels[i] * C + predicted[i]] += w ? w[i] : 1;
}

MIL_DEF mil_status mil_metric_confusion(mil_context *ctx, const int64_t *predicted, const int64_t *labels, int64_t n,
                                        int64_t C, int64_t *confusion)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_metric_sizes(ctx, "confusion", predicted, labels, confusion, n, C, 2);
    if (status == MIL_OK) status = mili_metric_labels(ctx, "confusion", labels, n, C);
    if (status == MIL_OK) status = mili_metric_labels(ctx, "confusion: predicted", predicted, n, C);
    if (status == MIL_OK) mili_confusion(predicted, labels, NULL, n, C, confusion);
    return status;
}

typedef struct { double tp, fp, fn, tn; } mili_counts;

MILI_FN double mili_confusion_sum(const int64_t *confusion, int64_t C)
{
    double n = 0;
    for (int64_t i = 0; i < C * C; i++) n += (double)confusion[i];
    return n;
}

// Class c of confusion [C, C], whose sum is n, against the rest.
MILI_FN mili_counts mili_counts_of(const int64_t *confusion, int64_t C, int64_t c, double n)
{
    mili_counts k = { (double)confusion[c * C + c], 0, 0, 0 };
    for (int64_t i = 0; i < C; i++) {
        if (i == c) continue;
        k.fp += (double)confusion[i * C + c];
        k.fn += (double)confusion[c * C + i];
    }
    k.tn = n - k.tp - k.fp - k.fn;
    return k;
}

enum { MILI_PRECISION, MILI_RECALL, MILI_SPECIFICITY, MILI_F1 };

MILI_FN double mili_class_value(mili_counts k, int what)
{
    const double tp = what == MILI_F1 ? 2 * k.tp : what == MILI_SPECIFICITY ? k.tn : k.tp;
    const double rest = what == MILI_PRECISION || what == MILI_SPECIFICITY ? k.fp : what == MILI_RECALL ? k.fn : k.fp + k.fn;
    if (k.tp + k.fp + k.fn == 0) return MILI_METRIC_NAN;   // neither seen nor predicted
    return tp == 0 ? 0 : tp / (tp + rest);
}

// The weighted mean of those values that are numbers.
typedef struct { double sum, weight; } mili_mean;

MILI_FN void mili_mean_add(mili_mean *m, double value, double weight)
{
    if (value != value) return;
    m->sum += weight * value;
    m->weight += weight;
}

MILI_FN double mili_mean_value(mili_mean m) { return m.weight > 0 ? m.sum / m.weight : MILI_METRIC_NAN; }

MILI_FN double mili_class_mean(const int64_t *confusion, int64_t C, mil_average average, int what, double *per_class)
{
    const double n = mili_confusion_sum(confusion, C);
    mili_mean mean = { 0, 0 };
    for (int64_t c = 0; c < C; c++) {
        const mili_counts k = mili_counts_of(confusion, C, c, n);
        const double value = mili_class_value(k, what);
        if (per_class) per_class[c] = value;
        mili_mean_add(&mean, value, average == MIL_AVERAGE_WEIGHTED ? k.tp + k.fn : 1);
    }
    return mili_mean_value(mean);
}

MILI_FN double mili_accuracy(const int64_t *confusion, int64_t C)
{
    double right = 0;
    for (int64_t c = 0; c < C; c++) right += (double)confusion[c * C + c];
    return right / mili_confusion_sum(confusion, C);
}

MILI_FN double mili_balanced_accuracy(const int64_t *confusion, int64_t C)
{
    const double n = mili_confusion_sum(confusion, C);
    mili_mean mean = { 0, 0 };
    for (int64_t c = 0; c < C; c++) {
        const mili_counts k = mili_counts_of(confusion, C, c, n);
        if (k.tp + k.fn > 0) mili_mean_add(&mean, k.tp / (k.tp + k.fn), 1);
    }
    return mili_mean_value(mean);
}

// 1 - sum w o / sum w e, w the weight of a disagreement, o the counts, e those that row and column sums lead one to expect. Columns
// are summed some at a time, for want of memory for all, so that many classes do not cost their number cubed.
MILI_FN double mili_kappa(const int64_t *confusion, int64_t C, mil_kappa_weights weights)
{
    const double n = mili_confusion_sum(confusion, C);
    double seen = 0, chance = 0, column[64];
    for (int64_t first = 0; first < C; first += MILI_COUNT(column)) {
        const int64_t end = MILI_MIN(C, first + MILI_COUNT(column));
        for (int64_t j = first; j < end; j++) {
            column[j - first] = 0;
            for (int64_t i = 0; i < C; i++) column[j - first] += (double)confusion[i * C + j];
        }
        for (int64_t i = 0; i < C; i++) {
            double row = 0;
            for (int64_t j = 0; j < C; j++) row += (double)confusion[i * C + j];
            for (int64_t j = first; j < end; j++) {
                const double d = (double)(i < j ? j - i : i - j);
                const double w = weights == MIL_KAPPA_UNWEIGHTED ? (d > 0) : weights == MIL_KAPPA_LINEAR ? d : d * d;
                seen += w * (double)confusion[i * C + j];
                chance += w * row * column[j - first] / n;
            }
        }
    }
    return chance > 0 ? 1 - seen / chance : MILI_METRIC_NAN;
}

MILI_FN mil_status mili_confusion_check(mil_context *ctx, const char *what, const int64_t *confusion, int64_t C,
                                        double *value)
{
    int64_t n = 0;
    mil_status status = mili_metric_sizes(ctx, what, confusion, confusion, value, C, C, 2);
    for (int64_t i = 0; status == MIL_OK && i < C * C; i++) {
        if (confusion[i] < 0 || confusion[i] > INT64_MAX - n)
            return mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: confusion[%lld, %lld] is %lld", what, (long long)(i / C),
                             (long long)(i % C), (long long)confusion[i]);
        n += confusion[i];
    }
    if (status == MIL_OK && n == 0) status = mili_fail(ctx, MIL_ERROR_ARGUMENT, "%s: the confusion matrix is empty", what);
    return status;
}

MIL_DEF mil_status mil_metric_accuracy(mil_context *ctx, const int64_t *confusion, int64_t C, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_confusion_check(ctx, "accuracy", confusion, C, value);
    if (status == MIL_OK) *value = mili_accuracy(confusion, C);
    return status;
}

MIL_DEF mil_status mil_metric_balanced_accuracy(mil_context *ctx, const int64_t *confusion, int64_t C, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_confusion_check(ctx, "balanced accuracy", confusion, C, value);
    if (status == MIL_OK) *value = mili_balanced_accuracy(confusion, C);
    return status;
}

MILI_FN mil_status mili_class_metric(mil_context *ctx, const char *name, int which, const int64_t *confusion, int64_t C,
                                     mil_average average, double *per_class, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_confusion_check(ctx, name, confusion, C, value);
    if (status == MIL_OK) *value = mili_class_mean(confusion, C, average, which, per_class);
    return status;
}

MIL_DEF mil_status mil_metric_precision(mil_context *ctx, const int64_t *confusion, int64_t C, mil_average average,
                                        double *per_class, double *value)
{
    return mili_class_metric(ctx, "precision", MILI_PRECISION, confusion, C, average, per_class, value);
}

MIL_DEF mil_status mil_metric_recall(mil_context *ctx, const int64_t *confusion, int64_t C, mil_average average,
                                     double *per_class, double *value)
{
    return mili_class_metric(ctx, "recall", MILI_RECALL, confusion, C, average, per_class, value);
}

MIL_DEF mil_status mil_metric_specificity(mil_context *ctx, const int64_t *confusion, int64_t C, mil_average average,
                                          double *per_class, double *value)
{
    return mili_class_metric(ctx, "specificity", MILI_SPECIFICITY, confusion, C, average, per_class, value);
}

MIL_DEF mil_status mil_metric_f1(mil_context *ctx, const int64_t *confusion, int64_t C, mil_average average,
                                 double *per_class, double *value)
{
    return mili_class_metric(ctx, "f1", MILI_F1, confusion, C, average, per_class, value);
}

MIL_DEF mil_status mil_metric_kappa(mil_context *ctx, const int64_t *confusion, int64_t C, mil_kappa_weights weights,
                                    double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_confusion_check(ctx, "kappa", confusion, C, value);
    if (status == MIL_OK) *value = mili_kappa(confusion, C, weights);
    return status;
}

// ---- ranking ---------------------------------------------------------------------------------------
// One column of scores, score i at s[i * stride], label `positive` against the rest; order [n] as mili_metric_sort gives it.

typedef struct {
    const double *s;
    int64_t stride;
    const int64_t *labels;                                 // [n]
    int64_t positive;
    const int64_t *order, *w;                              // [n] each; w NULL: each bag counts once
    int64_t n;
} mili_ranking;

// Bags of one score, from order[*at] on; moves *at behind them by `step`, +1 up from 0 or -1 down from n - 1.
MILI_FN void mili_ranking_next(const mili_ranking *r, int64_t *at, int64_t step, double *pos, double *neg)
{
    const double score = r->s[r->order[*at] * r->stride];
    *pos = *neg = 0;
    for (; *at >= 0 && *at < r->n && r->s[r->order[*at] * r->stride] == score; *at += step) {
        const int64_t i = r->order[*at];
        *(r->labels[i] == r->positive ? pos : neg) += r->w ? (double)r->w[i] : 1;
    }
}

// Counts below 2^53 pairs are exact in double.
MILI_FN double mili_auroc(const mili_ranking *r)
{
    double pos, neg, all_pos = 0, all_neg = 0, right = 0;
    for (int64_t at = 0; at < r->n; all_pos += pos, all_neg += neg) {
        mili_ranking_next(r, &at, 1, &pos, &neg);
        right += pos * all_neg + 0.5 * pos * neg;
    }
    return all_pos > 0 && all_neg > 0 ? right / (all_pos * all_neg) : MILI_METRIC_NAN;
}

MILI_FN double mili_average_precision(const mili_ranking *r)
{
    double pos, neg, all_pos = 0, all_neg = 0, sum = 0;
    for (int64_t at = r->n - 1; at >= 0; ) {
        mili_ranking_next(r, &at, -1, &pos, &neg);
        all_pos += pos;
        all_neg += neg;
        if (pos > 0) sum += pos * all_pos / (all_pos + all_neg);
    }
    return all_pos > 0 ? sum / all_pos : MILI_METRIC_NAN;
}

// Highest score from which on everything is called positive; J = tpr - fpr.
MILI_FN double mili_youden(const mili_ranking *r, double *best_j)
{
    double pos, neg, all_pos = 0, all_neg = 0, tp = 0, fp = 0, threshold = HUGE_VAL, best = 0;
    for (int64_t i = 0; i < r->n; i++) *(r->labels[i] == r->positive ? &all_pos : &all_neg) += 1;
    *best_j = MILI_METRIC_NAN;
    if (all_pos == 0 || all_neg == 0) return MILI_METRIC_NAN;
    for (int64_t at = r->n - 1; at >= 0; ) {
        const double score = r->s[r->order[at] * r->stride];
        mili_ranking_next(r, &at, -1, &pos, &neg);
        tp += pos;
        fp += neg;
        if (tp * all_neg - fp * all_pos > best) {          // J times both counts: exact
            best = tp * all_neg - fp * all_pos;
            threshold = score;
        }
    }
    *best_j = best / (all_pos * all_neg);
    return threshold;
}

enum { MILI_RANK_AUROC, MILI_RANK_AP, MILI_RANK_YOUDEN };

// Each column of scores [n, C] against the rest; one column alone belongs to class 1.
MILI_FN mil_status mili_rank_columns(mil_context *ctx, const char *what, int kind, const double *scores,
                                     const int64_t *labels, int64_t n, int64_t C, mil_average average, double *per_class,
                                     double *value, double *j)
{
    const int64_t classes = C < 2 ? 2 : C;
    const size_t bytes = (size_t)n * sizeof(int64_t);
    mili_mean mean = { 0, 0 };
    int64_t *order, *spare;
    mil_status status = mili_metric_labels(ctx, what, labels, n, classes);
    if (status == MIL_OK) status = mili_metric_scores(ctx, what, scores, n, C, 0);
    if (status != MIL_OK) return status;
    order = (int64_t *)mili_alloc(ctx, bytes);
    spare = order ? (int64_t *)mili_alloc(ctx, bytes) : NULL;
    if (!order || !spare) {
        mili_free(ctx, order, bytes);
        return MIL_ERROR_NO_MEMORY;
    }
    for (int64_t c = 0; c < C; c++) {
        mili_ranking r = { scores + c, C, labels, C < 2 ? 1 : c, order, NULL, n };
        double v, support = 0, best_j = 0;
        mili_metric_sort(r.s, r.stride, n, order, spare);
        v = kind == MILI_RANK_AUROC ? mili_auroc(&r)
          : kind == MILI_RANK_AP ? mili_average_precision(&r) : mili_youden(&r, &best_j);
        for (int64_t i = 0; i < n; i++) support += labels[i] == r.positive;
        if (per_class) per_class[c] = v;
        if (kind == MILI_RANK_YOUDEN) {
            *value = v;
            if (j) *j = best_j;
        }
        mili_mean_add(&mean, v, average == MIL_AVERAGE_WEIGHTED ? support : 1);
    }
    if (kind != MILI_RANK_YOUDEN) *value = mili_mean_value(mean);
    mili_free(ctx, spare, bytes);
    mili_free(ctx, order, bytes);
    return MIL_OK;
}

MIL_DEF mil_status mil_metric_auroc(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_metric_sizes(ctx, "auroc", scores, labels, value, n, 1, 1);
    if (status != MIL_OK) return status;
    return mili_rank_columns(ctx, "auroc", MILI_RANK_AUROC, scores, labels, n, 1, MIL_AVERAGE_MACRO, NULL, value, NULL);
}

MIL_DEF mil_status mil_metric_average_precision(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n,
                                                double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_metric_sizes(ctx, "average precision", scores, labels, value, n, 1, 1);
    if (status != MIL_OK) return status;
    return mili_rank_columns(ctx, "average precision", MILI_RANK_AP, scores, labels, n, 1, MIL_AVERAGE_MACRO, NULL, value,
                             NULL);
}

MIL_DEF mil_status mil_metric_auroc_ovr(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n, int64_t C,
                                        mil_average average, double *per_class, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_metric_sizes(ctx, "auroc", scores, labels, value, n, C, 2);
    if (status != MIL_OK) return status;
    return mili_rank_columns(ctx, "auroc", MILI_RANK_AUROC, scores, labels, n, C, average, per_class, value, NULL);
}

MIL_DEF mil_status mil_metric_average_precision_ovr(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n,
                                                    int64_t C, mil_average average, double *per_class, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_metric_sizes(ctx, "average precision", scores, labels, value, n, C, 2);
    if (status != MIL_OK) return status;
    return mili_rank_columns(ctx, "average precision", MILI_RANK_AP, scores, labels, n, C, average, per_class, value, NULL);
}

MIL_DEF mil_status mil_metric_youden(mil_context *ctx, const double *scores, const int64_t *labels, int64_t n,
                                     double *threshold, double *j)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mil_status status = mili_metric_sizes(ctx, "youden", scores, labels, threshold, n, 1, 1);
    if (status != MIL_OK) return status;
    return mili_rank_columns(ctx, "youden", MILI_RANK_YOUDEN, scores, labels, n, 1, MIL_AVERAGE_MACRO, NULL, threshold, j);
}

// ---- calibration -----------------------------------------------------------------------------------

// Squared error of one bag, p [C].
MILI_FN double mili_brier(const double *p, int64_t C, int64_t label)
{
    double sum = 0;
    for (int64_t c = 0; c < C; c++) {
        const double d = p[c] - (C > 1 ? label == c : label == 1);
        sum += d * d;
    }
    return C == 2 ? sum / 2 : sum;
}

MILI_FN double mili_log_loss(const double *p, int64_t C, int64_t label)
{
    const double q = mili_metric_probability(p, C, label), least = 2.220446049250313e-16;
    return q >= 1 ? 0 : -log(q > least ? q : least);
}

// bin [3, bins]: bags, bags that are right, sum of the top probability. One bag, counted w times.
MILI_FN void mili_ece_add(double *bin, int64_t bins, const double *p, int64_t C, int64_t label, int64_t predicted, double w)
{
    const double top = mili_metric_probability(p, C, predicted);
    int64_t b = (int64_t)ceil(top * (double)bins) - 1;     // (lo, hi]
    b = b < 0 ? 0 : b >= bins ? bins - 1 : b;
    bin[b] += w;
    bin[bins + b] += predicted == label ? w : 0;
    bin[2 * bins + b] += w * top;
}

MILI_FN double mili_ece(const double *bin, int64_t bins)
{
    double n = 0, sum = 0;
    for (int64_t b = 0; b < bins; b++) {
        n += bin[b];
        sum += fabs(bin[bins + b] - bin[2 * bins + b]);
    }
    return sum / n;
}

MILI_FN mil_status mili_calibration_check(mil_context *ctx, const char *what, const double *p, const int64_t *labels,
                                          int64_t n, int64_t C, const double *value)
{
    mil_status status = mili_metric_sizes(ctx, what, p, labels, value, n, C, 1);
    if (status == MIL_OK) status = mili_metric_labels(ctx, what, labels, n, C < 2 ? 2 : C);
    if (status == MIL_OK) status = mili_metric_probabilities(ctx, what, p, n, C);
    return status;
}

MIL_DEF mil_status mil_metric_brier(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                    int64_t C, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    double sum = 0;
    mil_status status = mili_calibration_check(ctx, "brier", probabilities, labels, n, C, value);
    if (status != MIL_OK) return status;
    for (int64_t i = 0; i < n; i++) sum += mili_brier(probabilities + i * C, C, labels[i]);
    *value = sum / (double)n;
    return MIL_OK;
}

MIL_DEF mil_status mil_metric_log_loss(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                       int64_t C, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    double sum = 0;
    mil_status status = mili_calibration_check(ctx, "log loss", probabilities, labels, n, C, value);
    if (status != MIL_OK) return status;
    for (int64_t i = 0; i < n; i++) sum += mili_log_loss(probabilities + i * C, C, labels[i]);
    *value = sum / (double)n;
    return MIL_OK;
}

MIL_DEF mil_status mil_metric_ece(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                  int64_t C, int64_t bins, double *value)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    double *bin;
    size_t bytes = 0;
    mil_status status = mili_calibration_check(ctx, "ece", probabilities, labels, n, C, value);
    if (status != MIL_OK) return status;
    if (bins < 1 || (uint64_t)bins > SIZE_MAX || !mili_mul_size((size_t)bins, 3 * sizeof(double), &bytes))
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "ece: %lld bins", (long long)bins);
    bin = (double *)mili_alloc(ctx, bytes);
    if (!bin) return MIL_ERROR_NO_MEMORY;
    memset(bin, 0, bytes);
    for (int64_t i = 0; i < n; i++) {
        const double *p = probabilities + i * C;
        mili_ece_add(bin, bins, p, C, labels[i], mili_metric_argmax(p, C), 1);
    }
    *value = mili_ece(bin, bins);
    mili_free(ctx, bin, bytes);
    return MIL_OK;
}

// Mean negative log-likelihood of softmax(beta z); by beta its slope mean(E_p[z] - z_y), its curvature mean(Var_p[z]) >= 0.
MILI_FN double mili_temperature_nll(const double *logits, const int64_t *labels, int64_t n, int64_t C, double beta,
                                    double *slope, double *curvature)
{
    double nll = 0, d1 = 0, d2 = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t width = C < 2 ? 2 : C;
        double top = C < 2 ? 0 : logits[i * C], sum = 0, mean = 0, square = 0, own = 0;
        for (int64_t c = 0; c < C; c++) top = logits[i * C + c] > top ? logits[i * C + c] : top;
        for (int64_t c = 0; c < width; c++) {              // one logit z is the pair (0, z)
            const double z = (C > 1 ? logits[i * C + c] : c ? logits[i] : 0) - top, e = exp(beta * z);
            sum += e;
            mean += e * z;
            square += e * z * z;
            if (c == labels[i]) own = z;
        }
        mean /= sum;
        nll += log(sum) - beta * own;
        d1 += mean - own;
        d2 += square / sum - mean * mean;
    }
    *slope = d1 / (double)n;
    *curvature = d2 / (double)n;
    return nll / (double)n;
}

MIL_DEF mil_status mil_temperature_fit(mil_context *ctx, const double *logits, const int64_t *labels, int64_t n, int64_t C,
                                       double *temperature, double *nll)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    double low = 0.01, high = 100, beta = 1, slope, edge, curvature, value;     // bracket of beta = 1 / T
    mil_status status = mili_metric_sizes(ctx, "temperature", logits, labels, temperature, n, C, 1);
    if (status == MIL_OK) status = mili_metric_labels(ctx, "temperature", labels, n, C < 2 ? 2 : C);
    if (status == MIL_OK) status = mili_metric_scores(ctx, "temperature", logits, n, C, 1);
    if (status != MIL_OK) return status;
    mili_temperature_nll(logits, labels, n, C, beta, &slope, &curvature);
    if (!mili_is_finite_f64(slope)) return mili_fail(ctx, MIL_ERROR_NUMERIC, "temperature: the logits are too large");
    if (slope < 0) {
        mili_temperature_nll(logits, labels, n, C, high, &edge, &curvature);
        if (edge <= 0) beta = low = high;
    } else {
        mili_temperature_nll(logits, labels, n, C, low, &edge, &curvature);
        if (edge >= 0 && slope > 0) beta = high = low;
        else if (edge < 0 && slope == 0) {                 // so large that the slope is lost already at beta = 1
            mili_temperature_nll(logits, labels, n, C, high, &edge, &curvature);
            if (edge <= 0) beta = low = high;
        }
    }
    for (int step = 0; step < 200 && low < high; step++) { // bisection alone would be done after 60
        double next;
        mili_temperature_nll(logits, labels, n, C, beta, &slope, &curvature);
        if (slope == 0) break;
        *(slope < 0 ? &low : &high) = beta;
        next = beta - slope / curvature;
        if (!(next > low && next < high)) next = sqrt(low * high);
        if (!(fabs(next - beta) > 1e-14 * beta)) break;
        beta = next;
    }
    value = mili_temperature_nll(logits, labels, n, C, beta, &slope, &curvature);
    if (!(value - value == 0)) return mili_fail(ctx, MIL_ERROR_NUMERIC, "temperature: the logits are too large");
    *temperature = 1 / beta;
    if (nll) *nll = value;
    return MIL_OK;
}

// ---- survival --------------------------------------------------------------------------------------
// A Fenwick tree over the bags in order of risk counts those that outlive the one in hand, which makes n^2 pairs n log n.
// Bags enter from the latest time to the earliest; at equal times the censored ones first, then the events ask, then enter.

// work [4, n]
MILI_FN void mili_cindex(const double *risk, const double *times, const int64_t *events, int64_t n, double tolerance,
                         int64_t *work, mil_cindex *out)
{
    int64_t *by_time = work, *by_risk = work + n, *rank = work + 2 * n, *tree = work + 3 * n;
    double pairs;
    mil_cindex r = { 0, 0, 0, 0, 0 };
    mili_metric_sort(times, 1, n, by_time, tree);
    mili_metric_sort(risk, 1, n, by_risk, tree);
    for (int64_t i = 0; i < n; i++) {
        rank[by_risk[i]] = i;
        tree[i] = 0;
    }
    for (int64_t end = n - 1, start, entered = 0; end >= 0; end = start) {
        int64_t censored = 0;
        for (start = end; start >= 0 && times[by_time[start]] == times[by_time[end]]; start--) {}
        for (int pass = 0; pass < 3; pass++)               // censored enter, events ask, events enter
            for (int64_t k = start + 1; k <= end; k++) {
                const int64_t i = by_time[k];
                if (events[i] != (pass > 0)) continue;
                if (pass != 1) {
                    for (int64_t t = rank[i] + 1; t <= n; t += t & -t) tree[t - 1]++;
                    entered++;
                    censored += pass == 0;
                } else {
                    int64_t below[2] = { 0, 0 };           // bags entered below i's ties, and below or tied
                    for (int side = 0; side < 2; side++) {
                        int64_t lo = 0, hi = n;
                        while (lo < hi) {
                            const int64_t mid = lo + (hi - lo) / 2;
                            const double d = risk[by_risk[mid]] - risk[i];
                            if (side == 0 ? d < -tolerance : d <= tolerance) lo = mid + 1;
                            else hi = mid;
                        }
                        for (int64_t t = lo; t > 0; t -= t & -t) below[side] += tree[t - 1];
                    }
                    r.concordant += below[0];
                    r.tied_risk += below[1] - below[0];
                    r.discordant += entered - below[1];
                    r.tied_time += censored;
                }
            }
    }
    pairs = (double)r.concordant + (double)r.discordant + (double)r.tied_risk;
    r.value = pairs > 0 ? ((double)r.concordant + 0.5 * (double)r.tied_risk) / pairs : MILI_METRIC_NAN;
    *out = r;
}

MILI_FN mil_status mili_cindex_check(mil_context *ctx, const double *risk, const double *times, const int64_t *events,
                                     int64_t n, double tolerance, const void *out)
{
    mil_status status = mili_metric_sizes(ctx, "c-index", risk, times, out, n, 1, 1);
    if (status == MIL_OK && !events) status = mili_fail(ctx, MIL_ERROR_ARGUMENT, "c-index: a NULL array or result");
    if (status == MIL_OK && !(tolerance >= 0 && tolerance < HUGE_VAL))
        status = mili_fail(ctx, MIL_ERROR_ARGUMENT, "c-index: tolerance %g", tolerance);
    if (status == MIL_OK) status = mili_metric_scores(ctx, "c-index: risk", risk, n, 1, 1);
    if (status == MIL_OK) status = mili_metric_scores(ctx, "c-index: times", times, n, 1, 1);
    if (status == MIL_OK) status = mili_metric_labels(ctx, "c-index: events", events, n, 2);
    return status;
}

MIL_DEF mil_status mil_metric_cindex(mil_context *ctx, const double *risk, const double *times, const int64_t *events,
                                     int64_t n, double tolerance, mil_cindex *out)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    const size_t bytes = 4 * (size_t)n * sizeof(int64_t);
    int64_t *work;
    mil_status status = mili_cindex_check(ctx, risk, times, events, n, tolerance, out);
    if (status != MIL_OK) return status;
    work = (int64_t *)mili_alloc(ctx, bytes);
    if (!work) return MIL_ERROR_NO_MEMORY;
    mili_cindex(risk, times, events, n, tolerance, work, out);
    mili_free(ctx, work, bytes);
    return MIL_OK;
}

// ---- everything at once ----------------------------------------------------------------------------

enum { MILI_METRICS_ECE_BINS = 15 };

typedef struct {
    const double *p;                                       // [n, C]
    const int64_t *labels;                                 // [n]
    int64_t n, C, classes;                                 // classes: C, or 2 when C = 1
    int64_t ranked;                                        // columns ranked: class 1 alone for two classes, else all
    int64_t *order;                                        // [ranked, n]
    int64_t *predicted;                                    // [n]
    int64_t *confusion;                                    // [classes, classes]
    int64_t *block;                                        // the one allocation that holds them
    size_t bytes;
} mili_metric_set;

MILI_FN void mili_metric_set_close(mil_context *ctx, mili_metric_set *set) { mili_free(ctx, set->block, set->bytes); }

MILI_FN mil_status mili_metric_set_open(mil_context *ctx, const double *p, const int64_t *labels, int64_t n, int64_t C,
                                        const void *out, mili_metric_set *set)
{
    size_t cells, squares;
    mil_status status = mili_metric_sizes(ctx, "metrics", p, labels, out, n, C, 1);
    if (status == MIL_OK) status = mili_metric_labels(ctx, "metrics", labels, n, C < 2 ? 2 : C);
    if (status == MIL_OK) status = mili_metric_probabilities(ctx, "metrics", p, n, C);
    if (status != MIL_OK) return status;
    set->p = p;
    set->labels = labels;
    set->n = n;
    set->C = C;
    set->classes = C < 2 ? 2 : C;
    set->ranked = C > 2 ? C : 1;
    if (!mili_mul_size((size_t)n, (size_t)set->ranked + 2, &cells) ||
        !mili_mul_size((size_t)set->classes, (size_t)set->classes, &squares) || !mili_add_size(cells, squares, &cells) ||
        !mili_mul_size(cells, sizeof(int64_t), &set->bytes))
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "metrics: [%lld, %lld] is too large", (long long)n, (long long)C);
    set->block = (int64_t *)mili_alloc(ctx, set->bytes);
    if (!set->block) return MIL_ERROR_NO_MEMORY;
    set->order = set->block;
    set->predicted = set->order + set->ranked * n;
    set->confusion = set->predicted + 2 * n;
    for (int64_t c = 0; c < set->ranked; c++)
        mili_metric_sort(p + (C == 2 ? 1 : c), C, n, set->order + c * n, set->predicted + n);
    for (int64_t i = 0; i < n; i++) set->predicted[i] = mili_metric_argmax(p + i * C, C);
    return MIL_OK;
}

// All metrics with bag i counted w[i] times; w NULL: once.
MILI_FN void mili_metric_set_value(const mili_metric_set *set, const int64_t *w, mil_metrics *m)
{
    const int64_t n = set->n, C = set->C, classes = set->classes, *confusion = set->confusion;
    mili_mean auroc = { 0, 0 }, auroc_weighted = { 0, 0 }, ap = { 0, 0 };
    double bin[3 * MILI_METRICS_ECE_BINS] = { 0 }, brier = 0, log_loss = 0, total = 0;

    mili_confusion(set->predicted, set->labels, w, n, classes, set->confusion);
    m->count = 0;
    m->class_count = classes;
    m->absent_count = 0;
    for (int64_t t = 0; t < classes; t++) {
        int64_t row = 0;
        for (int64_t c = 0; c < classes; c++) row += confusion[t * classes + c];
        m->count += row;
        m->absent_count += row == 0;
    }
    m->accuracy = mili_accuracy(confusion, classes);
    m->balanced_accuracy = mili_balanced_accuracy(confusion, classes);
    m->f1_macro = mili_class_mean(confusion, classes, MIL_AVERAGE_MACRO, MILI_F1, NULL);
    m->f1_weighted = mili_class_mean(confusion, classes, MIL_AVERAGE_WEIGHTED, MILI_F1, NULL);
    m->precision_macro = mili_class_mean(confusion, classes, MIL_AVERAGE_MACRO, MILI_PRECISION, NULL);
    m->recall_macro = mili_class_mean(confusion, classes, MIL_AVERAGE_MACRO, MILI_RECALL, NULL);
    m->specificity_macro = mili_class_mean(confusion, classes, MIL_AVERAGE_MACRO, MILI_SPECIFICITY, NULL);
    m->f1 = m->precision = m->sensitivity = m->specificity = MILI_METRIC_NAN;
    if (classes == 2) {
        const mili_counts k = mili_counts_of(confusion, 2, 1, (double)m->count);
        m->f1 = mili_class_value(k, MILI_F1);
        m->precision = mili_class_value(k, MILI_PRECISION);
        m->sensitivity = mili_class_value(k, MILI_RECALL);
        m->specificity = mili_class_value(mili_counts_of(confusion, 2, 0, (double)m->count), MILI_RECALL);
    }
    m->kappa = mili_kappa(confusion, classes, MIL_KAPPA_UNWEIGHTED);
    m->kappa_linear = mili_kappa(confusion, classes, MIL_KAPPA_LINEAR);
    m->kappa_quadratic = mili_kappa(confusion, classes, MIL_KAPPA_QUADRATIC);

    for (int64_t c = 0; c < set->ranked; c++) {
        const mili_ranking r = { set->p + (C == 2 ? 1 : c), C, set->labels, C > 2 ? c : 1, set->order + c * n, w, n };
        const mili_counts k = mili_counts_of(confusion, classes, r.positive, (double)m->count);
        const double area = mili_auroc(&r);
        mili_mean_add(&auroc, area, 1);
        mili_mean_add(&auroc_weighted, area, k.tp + k.fn);
        mili_mean_add(&ap, mili_average_precision(&r), 1);
    }
    m->auroc = mili_mean_value(auroc);
    m->auroc_weighted = mili_mean_value(auroc_weighted);
    m->average_precision = mili_mean_value(ap);

    for (int64_t i = 0; i < n; i++) {
        const double *p = set->p + i * C, count = w ? (double)w[i] : 1;
        if (count == 0) continue;
        total += count;
        brier += count * mili_brier(p, C, set->labels[i]);
        log_loss += count * mili_log_loss(p, C, set->labels[i]);
        mili_ece_add(bin, MILI_METRICS_ECE_BINS, p, C, set->labels[i], set->predicted[i], count);
    }
    m->brier = brier / total;
    m->log_loss = log_loss / total;
    m->ece = mili_ece(bin, MILI_METRICS_ECE_BINS);
}

MIL_DEF mil_status mil_metrics_compute(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                       int64_t C, mil_metrics *out)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mili_metric_set set;
    mil_status status = mili_metric_set_open(ctx, probabilities, labels, n, C, out, &set);
    if (status != MIL_OK) return status;
    mili_metric_set_value(&set, NULL, out);
    mili_metric_set_close(ctx, &set);
    return MIL_OK;
}

// ---- bootstrap -------------------------------------------------------------------------------------

MIL_DEF mil_bootstrap_options mil_bootstrap_default(void)
{
    mil_bootstrap_options o;
    o.resamples = 1000;
    o.confidence = 0.95;
    o.seed = 0;
    o.stratify = MIL_STRATIFY_NEEDED;
    o.indices = NULL;
    return o;
}

typedef struct {
    mil_bootstrap_options o;
    int64_t n, classes, metrics;                           // metrics: values per resample
    int64_t *draw;                                         // [n] indices
    int64_t *counts;                                       // [n] how often each bag was drawn
    int64_t *member;                                       // [n] the bags class by class
    int64_t *start;                                        // [classes + 1] where each class begins in member
    int64_t *seen;                                         // [classes]
    int64_t *order, *spare;                                // [resamples] each, to sort values
    double *values;                                        // [metrics, resamples]
    int64_t *block;
    size_t bytes;
    int64_t stratified;
} mili_resampler;

// 0 <= result < count
MILI_FN int64_t mili_bootstrap_index(uint64_t key, uint64_t counter, int64_t count)
{
    const uint64_t x = mili_mix(key + (counter + 1) * UINT64_C(0x9E3779B97F4A7C15));
    const int64_t i = (int64_t)((double)(x >> 11) * (1.0 / 9007199254740992.0) * (double)count);
    return i < count ? i : count - 1;
}

MILI_FN void mili_bootstrap_close(mil_context *ctx, mili_resampler *b) { mili_free(ctx, b->block, b->bytes); }

// labels NULL: one class. The labels are already known to lie in 0..classes-1.
MILI_FN mil_status mili_bootstrap_open(mil_context *ctx, const mil_bootstrap_options *options, const int64_t *labels,
                                       int64_t n, int64_t classes, int64_t metrics, mili_resampler *b)
{
    size_t cells, values;
    b->o = options ? *options : mil_bootstrap_default();
    b->n = n;
    b->classes = classes;
    b->metrics = metrics;
    b->stratified = 0;
    if (b->o.resamples < 2)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "bootstrap: %lld resamples, at least 2 needed", (long long)b->o.resamples);
    if (!(b->o.confidence > 0 && b->o.confidence < 1))
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "bootstrap: confidence %g is not between 0 and 1", b->o.confidence);
    if ((int)b->o.stratify < 0 || (int)b->o.stratify > (int)MIL_STRATIFY_NEVER)
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "bootstrap: stratify %d does not exist", (int)b->o.stratify);
    if ((uint64_t)b->o.resamples > SIZE_MAX || !mili_mul_size((size_t)b->o.resamples, (size_t)metrics + 2, &values) ||
        !mili_mul_size((size_t)n, 3, &cells) || !mili_add_size(cells, 2 * (size_t)classes + 1, &cells) ||
        !mili_add_size(cells, values, &cells) || !mili_mul_size(cells, sizeof(int64_t), &b->bytes))
        return mili_fail(ctx, MIL_ERROR_ARGUMENT, "bootstrap: %lld resamples of %lld are too many",
                         (long long)b->o.resamples, (long long)n);
    if (b->o.indices)
        for (int64_t r = 0; r < b->o.resamples; r++) {
            mil_status status = mili_metric_labels(ctx, "bootstrap: indices", b->o.indices + r * n, n, n);
            if (status != MIL_OK) return status;
        }
    b->block = (int64_t *)mili_alloc(ctx, b->bytes);
    if (!b->block) return MIL_ERROR_NO_MEMORY;
    b->values = (double *)b->block;                        // int64_t and double are of one size: one block holds both
    b->order = b->block + metrics * b->o.resamples;
    b->spare = b->order + b->o.resamples;
    b->draw = b->spare + b->o.resamples;
    b->counts = b->draw + n;
    b->member = b->counts + n;
    b->start = b->member + n;
    b->seen = b->start + classes + 1;
    for (int64_t c = 0; c <= classes; c++) b->start[c] = 0;
    for (int64_t i = 0; i < n; i++) b->start[(labels ? labels[i] : 0) + 1]++;
    for (int64_t c = 0; c < classes; c++) {
        b->start[c + 1] += b->start[c];
        b->seen[c] = b->start[c];
    }
    for (int64_t i = 0; i < n; i++) b->member[b->seen[labels ? labels[i] : 0]++] = i;
    return MIL_OK;
}

// draw [n]: the indices of resample r.
MILI_FN const int64_t *mili_bootstrap_draw(mili_resampler *b, const int64_t *labels, int64_t r)
{
    const uint64_t key = mili_mix(b->o.seed ^ UINT64_C(0x6D696C2E626F6F74));    // "mil.boot"
    const uint64_t at = (uint64_t)r * (uint64_t)b->n;
    int lost = 0;
    if (b->o.indices) return b->o.indices + r * b->n;
    if (b->o.stratify != MIL_STRATIFY_ALWAYS) {
        for (int64_t c = 0; c < b->classes; c++) b->seen[c] = 0;
        for (int64_t i = 0; i < b->n; i++) {
            b->draw[i] = mili_bootstrap_index(key, at + (uint64_t)i, b->n);
            b->seen[labels ? labels[b->draw[i]] : 0]++;
        }
        for (int64_t c = 0; c < b->classes; c++) lost |= b->seen[c] == 0 && b->start[c + 1] > b->start[c];
        if (!lost || b->o.stratify == MIL_STRATIFY_NEVER) return b->draw;
    }
    b->stratified++;
    for (int64_t c = 0; c < b->classes; c++)
        for (int64_t i = b->start[c]; i < b->start[c + 1]; i++) {
            const int64_t k = mili_bootstrap_index(~key, at + (uint64_t)i, b->start[c + 1] - b->start[c]);
            b->draw[i] = b->member[b->start[c] + k];
        }
    return b->draw;
}

// counts [n]: how often resample r has each bag.
MILI_FN const int64_t *mili_bootstrap_counts(mili_resampler *b, const int64_t *labels, int64_t r)
{
    const int64_t *draw = mili_bootstrap_draw(b, labels, r);
    for (int64_t i = 0; i < b->n; i++) b->counts[i] = 0;
    for (int64_t i = 0; i < b->n; i++) b->counts[draw[i]]++;
    return b->counts;
}

// The interval of metric k from its values [resamples], which are sorted and packed on the way.
MILI_FN void mili_bootstrap_interval(mili_resampler *b, int64_t k, double value, mil_interval *out)
{
    double *v = b->values + k * b->o.resamples, sum = 0, square = 0, edge[2];
    int64_t n = 0;
    for (int64_t r = 0; r < b->o.resamples; r++)
        if (v[r] == v[r]) v[n++] = v[r];
    mili_metric_sort(v, 1, n, b->order, b->spare);
    for (int64_t i = 0; i < n; i++) sum += v[i];
    for (int64_t i = 0; i < n; i++) square += (v[i] - sum / (double)n) * (v[i] - sum / (double)n);
    for (int side = 0; side < 2; side++) {
        const double q = side ? (1 + b->o.confidence) / 2 : (1 - b->o.confidence) / 2, place = q * (double)(n - 1);
        int64_t lo = (int64_t)place;
        if (n == 0) {
            edge[side] = MILI_METRIC_NAN;
            continue;
        }
        if (lo > n - 2) lo = n > 1 ? n - 2 : 0;
        edge[side] = v[b->order[lo]];
        if (n > 1 && v[b->order[lo + 1]] != edge[side])    // equal neighbours, infinite ones too, stay as they are
            edge[side] += (place - (double)lo) * (v[b->order[lo + 1]] - edge[side]);
    }
    out->value = value;
    out->mean = n > 0 ? sum / (double)n : MILI_METRIC_NAN;
    out->std = n > 1 ? sqrt(square / (double)(n - 1)) : MILI_METRIC_NAN;
    out->low = edge[0];
    out->high = edge[1];
    out->resamples = n;
    out->stratified = b->stratified;
}

MIL_DEF mil_status mil_bootstrap(mil_context *ctx, mil_metric_function metric, void *user, const int64_t *labels, int64_t n,
                                 int64_t C, const mil_bootstrap_options *options, mil_interval *out)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mili_resampler b;
    double value = 0;
    const int64_t classes = labels ? C : 1;
    mil_status status = mili_metric_sizes(ctx, "bootstrap", out, out, out, n, classes, 1);
    if (status == MIL_OK && !metric) status = mili_fail(ctx, MIL_ERROR_ARGUMENT, "bootstrap: no metric");
    if (status == MIL_OK && labels) status = mili_metric_labels(ctx, "bootstrap", labels, n, classes);
    if (status == MIL_OK) status = mili_bootstrap_open(ctx, options, labels, n, classes, 1, &b);
    if (status != MIL_OK) return status;
    for (int64_t i = 0; i < n; i++) b.counts[i] = i;
    status = metric(ctx, user, b.counts, n, &value);
    for (int64_t r = 0; status == MIL_OK && r < b.o.resamples; r++) {
        b.values[r] = MILI_METRIC_NAN;
        status = metric(ctx, user, mili_bootstrap_draw(&b, labels, r), n, &b.values[r]);
    }
    if (status == MIL_OK) mili_bootstrap_interval(&b, 0, value, out);
    mili_bootstrap_close(ctx, &b);
    return status;
}

MIL_DEF mil_status mil_metrics_bootstrap(mil_context *ctx, const double *probabilities, const int64_t *labels, int64_t n,
                                         int64_t C, const mil_bootstrap_options *options, mil_interval *out)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mili_metric_set set;
    mili_resampler b;
    mil_metrics m;
    mil_status status = mili_metric_set_open(ctx, probabilities, labels, n, C, out, &set);
    if (status != MIL_OK) return status;
    status = mili_bootstrap_open(ctx, options, labels, n, set.classes, MIL_METRIC_COUNT, &b);
    if (status == MIL_OK) {
        for (int64_t r = 0; r < b.o.resamples; r++) {
            mili_metric_set_value(&set, mili_bootstrap_counts(&b, labels, r), &m);
            for (int k = 0; k < (int)MIL_METRIC_COUNT; k++)
                b.values[k * b.o.resamples + r] = mil_metric_value(&m, (mil_metric)k);
        }
        mili_metric_set_value(&set, NULL, &m);
        for (int k = 0; k < (int)MIL_METRIC_COUNT; k++)
            mili_bootstrap_interval(&b, k, mil_metric_value(&m, (mil_metric)k), out + k);
        mili_bootstrap_close(ctx, &b);
    }
    mili_metric_set_close(ctx, &set);
    return status;
}

typedef struct {
    const double *risk, *times;                            // [n] each
    const int64_t *events;                                 // [n]
    double tolerance;
    double *drawn;                                         // [2, n] risk and times of a resample
    int64_t *drawn_events;                                 // [5, n] its events, then room for mili_cindex
} mili_cindex_user;

MILI_FN mil_status mili_cindex_drawn(mil_context *ctx, void *user, const int64_t *indices, int64_t n, double *value)
{
    const mili_cindex_user *u = (const mili_cindex_user *)user;
    mil_cindex c;
    (void)ctx;
    for (int64_t i = 0; i < n; i++) {
        u->drawn[i] = u->risk[indices[i]];
        u->drawn[n + i] = u->times[indices[i]];
        u->drawn_events[i] = u->events[indices[i]];
    }
    mili_cindex(u->drawn, u->drawn + n, u->drawn_events, n, u->tolerance, u->drawn_events + n, &c);
    *value = c.value;
    return MIL_OK;
}

MIL_DEF mil_status mil_cindex_bootstrap(mil_context *ctx, const double *risk, const double *times, const int64_t *events,
                                        int64_t n, double tolerance, const mil_bootstrap_options *options, mil_interval *out)
{
    if (!mili_begin(ctx)) return MIL_ERROR_ARGUMENT;
    mili_cindex_user u;
    const size_t bytes = 7 * (size_t)n * sizeof(double);
    mil_status status = mili_cindex_check(ctx, risk, times, events, n, tolerance, out);
    if (status != MIL_OK) return status;
    u.risk = risk;
    u.times = times;
    u.events = events;
    u.tolerance = tolerance;
    u.drawn = (double *)mili_alloc(ctx, bytes);            // [2, n] double, then [5, n] int64_t
    if (!u.drawn) return MIL_ERROR_NO_MEMORY;
    u.drawn_events = (int64_t *)(u.drawn + 2 * n);
    status = mil_bootstrap(ctx, mili_cindex_drawn, &u, events, n, 2, options, out);
    mili_free(ctx, u.drawn, bytes);
    return status;
}
#endif // MIL_NO_METRICS

// ==== >>end: private macros are private ===========================================================================
// A file that wants them (a test of the private parts, another header of the library) defines MIL_KEEP_PRIVATE_MACROS.

#ifndef MIL_KEEP_PRIVATE_MACROS
#undef MILI_ABMIL_OPTIONS
#undef MILI_ABMIL_TORCHMIL_OPTIONS
#undef MILI_ALIGN
#undef MILI_ALL16
#undef MILI_ALL8
#undef MILI_ATTENTION_FEW
#undef MILI_ATTENTION_KEYS
#undef MILI_ATTENTION_QUERIES
#undef MILI_AVX2
#undef MILI_AVX2_ROWS
#undef MILI_AVX512
#undef MILI_AVX512_BF16
#undef MILI_AVX512_ROWS
#undef MILI_BIG_ENDIAN
#undef MILI_BINARY_ENUM
#undef MILI_BINARY_LIST
#undef MILI_BINARY_ROW
#undef MILI_CHUNK_HEAD
#undef MILI_CLAM_OPTIONS
#undef MILI_CONFIG
#undef MILI_CONFIG_MEMBER
#undef MILI_CONFIG_ROW
#undef MILI_CONVERT
#undef MILI_CONV_CHANNELS
#undef MILI_COUNT
#undef MILI_C_BOOL
#undef MILI_C_CHOICE
#undef MILI_C_INT
#undef MILI_C_INTS
#undef MILI_C_REAL
#undef MILI_C_TEXTS
#undef MILI_DEFINE_DOT4
#undef MILI_DEFINE_EXTREME
#undef MILI_DEFINE_FOLDS
#undef MILI_DEFINE_GRADS
#undef MILI_DEFINE_MAP
#undef MILI_DEFINE_MATHS
#undef MILI_DEFINE_TIER
#undef MILI_DEFINE_TILE
#undef MILI_DEFINE_TILES
#undef MILI_DEFINE_ZIP
#undef MILI_DFTD_OPTIONS
#undef MILI_DSMIL_OPTIONS
#undef MILI_DTYPE_ENUM
#undef MILI_DTYPE_NAME
#undef MILI_DTYPE_SIZE
#undef MILI_EACH
#undef MILI_EACH_GRAD
#undef MILI_ENCODERS
#undef MILI_ENCODER_ROW
#undef MILI_ERROR_SIZE
#undef MILI_FIRST_CHUNK
#undef MILI_FN
#undef MILI_FOREIGN_BITS
#undef MILI_FOREIGN_DTYPE_LIST
#undef MILI_GEMM_BLOCK
#undef MILI_GRAD
#undef MILI_GRAD_OPS
#undef MILI_ILRA_OPTIONS
#undef MILI_IN
#undef MILI_INF
#undef MILI_INLINE
#undef MILI_IN_INDEX
#undef MILI_IS_TRAINING
#undef MILI_JSON_MAX_DEPTH
#undef MILI_K
#undef MILI_KC
#undef MILI_KC_STEP
#undef MILI_KEY
#undef MILI_KNN_KEYS
#undef MILI_KNN_QUERIES
#undef MILI_LANES
#undef MILI_LIGHT_OP
#undef MILI_LOCK
#undef MILI_LOOK
#undef MILI_LOSS_ENUM
#undef MILI_MAX
#undef MILI_MAX_SLOTS
#undef MILI_METRIC_NAN
#undef MILI_MIN
#undef MILI_MORE_TILES
#undef MILI_MOST_BYTES
#undef MILI_MOST_STEPS
#undef MILI_MR_MAX
#undef MILI_NAN
#undef MILI_NEON_2
#undef MILI_NEON_ROWS
#undef MILI_NPY_MAX_HEADER
#undef MILI_NR_MAX
#undef MILI_OFFERS_BF16
#undef MILI_OPS
#undef MILI_OP_POINTER
#undef MILI_OS_CLOSE
#undef MILI_OS_FSTAT
#undef MILI_OS_MAP
#undef MILI_OS_OPEN
#undef MILI_OS_PATH
#undef MILI_OS_READ
#undef MILI_OS_REMOVE
#undef MILI_OS_RENAME
#undef MILI_OS_STAT
#undef MILI_OS_SYNC
#undef MILI_OS_UNMAP
#undef MILI_OS_WRITE
#undef MILI_OUT
#undef MILI_O_CLOEXEC
#undef MILI_PAIRS
#undef MILI_PAIRS_FROM
#undef MILI_PAIRS_TILE
#undef MILI_PASTE
#undef MILI_PASTE_
#undef MILI_PAUSE
#undef MILI_PIECE
#undef MILI_PLAIN_1
#undef MILI_PLAIN_2
#undef MILI_PLAIN_ROWS
#undef MILI_POSIX
#undef MILI_PREFETCH
#undef MILI_REAL_IS_DOUBLE
#undef MILI_REAL_MAX
#undef MILI_REAL_NAME_double
#undef MILI_REAL_NAME_float
#undef MILI_REDUCE_OP
#undef MILI_REDUCTION_ENUM
#undef MILI_REDUCTION_LIST
#undef MILI_REDUCTION_ROW
#undef MILI_RESTRICT
#undef MILI_RESULT_ENUM
#undef MILI_RESULT_NAME
#undef MILI_ROOM
#undef MILI_ROW
#undef MILI_ROWS_1
#undef MILI_ROWS_12
#undef MILI_ROWS_2
#undef MILI_ROWS_4
#undef MILI_ROWS_6
#undef MILI_ROWS_8
#undef MILI_ROWS_OP
#undef MILI_ROW_ADD
#undef MILI_ROW_FMA
#undef MILI_ROW_START
#undef MILI_ROW_STORE
#undef MILI_RRT_OPTIONS
#undef MILI_SHAPE
#undef MILI_SHOW
#undef MILI_SPINS
#undef MILI_STATE_VERSION
#undef MILI_STATUS_ENUM
#undef MILI_STATUS_NAME
#undef MILI_STATUS_TEXT
#undef MILI_STREAM_MAX
#undef MILI_TENSORS_MAX_HEADER
#undef MILI_TENSORS_META
#undef MILI_THIN
#undef MILI_THREADS
#undef MILI_THREAD_FN
#undef MILI_THREAD_RETURN
#undef MILI_TIERS_ARM
#undef MILI_TIERS_X86
#undef MILI_TILES
#undef MILI_TRAINED
#undef MILI_TRAIN_MEMBER
#undef MILI_TRAIN_ROW
#undef MILI_TRANSFORMER_OPTIONS
#undef MILI_TRANSMIL_OPTIONS
#undef MILI_UNARY_DECLARE
#undef MILI_UNARY_DEFINE
#undef MILI_UNARY_ENUM
#undef MILI_UNARY_EXTRA
#undef MILI_UNARY_ROW
#undef MILI_UNLOCK
#undef MILI_UNUSED
#undef MILI_WAIT
#undef MILI_WAKE_ALL
#undef MILI_WHOLE_OP
#undef MILI_WIKG_OPTIONS
#undef MILI_WINDOWS
#undef MILI_WRITER_ROOM
#undef MILI_WRITER_TRIES
#undef MILI_X
#undef mili_cos
#undef mili_erf
#undef mili_erfc
#undef mili_exp
#undef mili_fabs
#undef mili_floor
#undef mili_log
#undef mili_log1p
#undef mili_pow
#undef mili_sin
#undef mili_sqrt
#undef mili_tanh
#endif // MIL_KEEP_PRIVATE_MACROS

#endif // MIL_IMPLEMENTATION

// MIT License
//
// Copyright (c) 2026 The mil.h authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy
// of this software and associated documentation files (the "Software"), to deal
// in the Software without restriction, including without limitation the rights
// to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
// copies of the Software, and to permit persons to whom the Software is
// furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all
// copies or substantial portions of the Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
// IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
// FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
// AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
// LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
// OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
// SOFTWARE.
