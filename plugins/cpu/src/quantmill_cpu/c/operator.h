/* Operators of PyTorch made of this library's functions. Part of the ABI. */
#ifndef QUANTMILL_OPERATOR_H
#define QUANTMILL_OPERATOR_H

#include <stdint.h>

#define QM_TORCH_FUNCTIONS 10
#define QM_MOST_DIMENSIONS 64

/* Implement quantmill_cpu::product, product_bias, linear and linear_bias, which are defined already,
 * for the CPU. The addresses are those of TORCH_FUNCTIONS in operators.py, in that order. 0, or -1
 * where PyTorch refused. */
int qm_operators(const void *const *functions);

#endif
