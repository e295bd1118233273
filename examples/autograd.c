// Autograd in thirty lines: fits y = a e^(-b t) to measurements by gradient descent.
//
// Calling an op records it; mil_tape_backward records the gradients as more ops; mil_tape_run computes all of it, and
// mil_tape_rerun does so again with whatever the inputs' memory holds by then.
//
//     cc -O2 autograd.c -lm -lpthread && ./a.out
//
// Expected output:
// step    0: loss 0.34680
// step  100: loss 0.00019
// step 1000: loss 0.00001
// y = 2.000 e^(-0.700 t)
#define MIL_IMPLEMENTATION
#include "mil.h"
#include <stdio.h>

int main(void)
{
    float t[6] = { 0, 0.5f, 1, 1.5f, 2, 3 }, y[6] = { 2.0f, 1.41f, 0.99f, 0.70f, 0.49f, 0.25f };      // 2 e^(-0.7 t), rounded
    float a = 1, b = 0, loss, da, db;                     // the guess, and what the tape says of it
    mil_context *ctx;
    mil_tape *tape;
    if (mil_context_create(&ctx, NULL) != MIL_OK || mil_tape_create(ctx, &tape) != MIL_OK) return 1;

    const mil_tensor views[4] = { mil_tensor_matrix(t, MIL_F32, 1, 6), mil_tensor_matrix(y, MIL_F32, 1, 6),
                                  mil_tensor_matrix(&a, MIL_F32, 1, 1), mil_tensor_matrix(&b, MIL_F32, 1, 1) };
    mil_node *T = mil_input(tape, "t", &views[0]), *Y = mil_input(tape, "y", &views[1]);
    mil_node *A = mil_input(tape, "a", &views[2]), *B = mil_input(tape, "b", &views[3]);
    mil_node_want_grad(A);
    mil_node_want_grad(B);
    mil_node *model = mil_mul(A, mil_exp(mil_affine(mil_mul(B, T), -1, 0)));                          // [1, 6]
    mil_node *L = mil_mean(mil_square(mil_sub(model, Y)), 1);                                         // [1, 1]
    mil_tape_backward(tape, L);
    mil_node *dA = mil_node_grad(A), *dB = mil_node_grad(B);
    mil_node_keep(L);
    mil_node_keep(dA);
    mil_node_keep(dB);

    mil_status status = mil_tape_run(tape);               // reports the first error of everything above
    for (int step = 0; step <= 1000 && status == MIL_OK; step++, status = mil_tape_rerun(tape)) {
        mil_node_read(L, &loss, 1);
        mil_node_read(dA, &da, 1);
        mil_node_read(dB, &db, 1);
        if (step == 0 || step == 100 || step == 1000) printf("step %4d: loss %.5f\n", step, (double)loss);
        a -= 0.1f * da;
        b -= 0.1f * db;
    }
    if (status != MIL_OK) puts(mil_error(ctx));
    else printf("y = %.3f e^(-%.3f t)\n", (double)a, (double)b);
    mil_tape_free(tape);
    mil_context_free(ctx);
    return status != MIL_OK;
}
