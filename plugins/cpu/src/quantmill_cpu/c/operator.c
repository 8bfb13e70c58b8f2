/* qm_matmul and qm_linear as operators of PyTorch, by the C functions that PyTorch offers for that:
 * a call then needs no interpreter, in a compiled graph above all. Their addresses are handed over,
 * so nothing of PyTorch is needed to build this.
 *
 * An operator's arguments are words of 64 bits, which its results replace; a tensor is a handle,
 * and a handle that came in is the operator's to delete.
 */
#include "operator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "matmul.h"
#include "quantize.h"

#define QM_API __attribute__((visibility("default")))

typedef struct Handle *Handle;

enum { TORCH_HALF = 5, TORCH_FLOAT = 6, TORCH_BFLOAT = 15, TORCH_CPU = 0 };

static struct {
    int32_t (*library)(const char *space, const char *key, const char *file, uint32_t line, Handle *);
    int32_t (*implement)(Handle, const char *name, void (*)(uint64_t *, uint64_t, uint64_t));
    int32_t (*delete_tensor)(Handle);
    int32_t (*data)(Handle, void **);
    int32_t (*dimensions)(Handle, int64_t *);
    int32_t (*sizes)(Handle, int64_t **);
    int32_t (*strides)(Handle, int64_t **);
    int32_t (*dtype)(Handle, int32_t *);
    int32_t (*empty)(int64_t, const int64_t *, const int64_t *, int32_t dtype, int32_t device,
                     int32_t index, Handle *);
    int32_t (*threads)(uint32_t *);
} torch;

_Static_assert(sizeof torch == QM_TORCH_FUNCTIONS * sizeof(void *), "as many as are handed over");

/* C can't raise an exception: callers have looked at the arguments before. */
static void must(int fine, const char *what) {
    if (fine) return;
    fprintf(stderr, "quantmill_cpu: %s\n", what);
    abort();
}

static void *data_of(Handle tensor) {
    void *data = NULL;
    must(torch.data(tensor, &data) == 0, "a tensor without memory");
    return data;
}

/* The tensor's elements of `size` bytes in order, in memory of their own; NULL where they lie so. */
static char *in_order(Handle tensor, int64_t dimensions, const int64_t *sizes, int64_t count,
                      int64_t size) {
    int64_t *strides = NULL, expected = 1, at[QM_MOST_DIMENSIONS] = {0};
    int ordered = 1;
    must(torch.strides(tensor, &strides) == 0, "a tensor without strides");
    for (int64_t d = dimensions - 1; d >= 0; d--) {
        ordered &= sizes[d] == 1 || strides[d] == expected;
        expected *= sizes[d];
    }
    if (ordered || count == 0) return NULL;
    char *made = malloc((size_t)(count * size)), *to = made;
    must(made != NULL, "no memory for the activations");
    const char *from = data_of(tensor);
    for (int64_t i = 0; i < count; i++, to += size) {
        memcpy(to, from, (size_t)size);
        for (int64_t d = dimensions - 1; d >= 0; d--) {
            from += strides[d] * size;
            if (++at[d] < sizes[d]) break;
            from -= sizes[d] * strides[d] * size;
            at[d] = 0;
        }
    }
    return made;
}

/* Rows of activations, and where the results are to go. */
typedef struct {
    Handle y;
    int kind, threads;
    int64_t batch;
    char *moved; /* x in memory of its own, or NULL */
    const void *x;
} Call;

static Call call_of(Handle x, int64_t rows, int64_t columns) {
    int64_t dimensions = 0, *sizes = NULL, shape[QM_MOST_DIMENSIONS], strides[QM_MOST_DIMENSIONS];
    int32_t dtype = -1;
    uint32_t threads = 1;
    must(torch.dimensions(x, &dimensions) == 0 && torch.sizes(x, &sizes) == 0 &&
             torch.dtype(x, &dtype) == 0 && torch.threads(&threads) == 0 && dimensions > 0 &&
             dimensions <= QM_MOST_DIMENSIONS && sizes[dimensions - 1] == columns,
         "x does not fit the weight");
    const int kind = dtype == TORCH_BFLOAT ? QM_BF16 : dtype == TORCH_HALF ? QM_F16 : QM_F32;
    must(kind != QM_F32 || dtype == TORCH_FLOAT, "x has an unknown dtype");
    Call call = {NULL, kind, (int)threads, 1, NULL, NULL};
    int64_t stride = rows;
    for (int64_t d = dimensions - 2; d >= 0; d--) {
        shape[d] = sizes[d];
        strides[d] = stride;
        stride *= sizes[d];
        call.batch *= sizes[d];
    }
    shape[dimensions - 1] = rows;
    strides[dimensions - 1] = 1;
    must(torch.empty(dimensions, shape, strides, dtype, TORCH_CPU, -1, &call.y) == 0,
         "no memory for the result");
    call.moved = in_order(x, dimensions, sizes, call.batch * columns, kind == QM_F32 ? 4 : 2);
    call.x = call.moved ? call.moved : data_of(x);
    return call;
}

/* Arguments are the operator's to delete, and its result takes their place. */
static void finish(const Call *call, uint64_t *stack, Handle bias) {
    free(call->moved);
    torch.delete_tensor((Handle)(uintptr_t)stack[0]);
    torch.delete_tensor((Handle)(uintptr_t)stack[1]);
    if (bias) torch.delete_tensor(bias);
    stack[0] = (uint64_t)(uintptr_t)call->y;
}

/* product(x, weight, rows, columns) and product_bias(x, weight, rows, columns, bias). */
static void product(uint64_t *stack, uint64_t arguments, uint64_t results) {
    Handle x = (Handle)(uintptr_t)stack[0], weight = (Handle)(uintptr_t)stack[1];
    Handle bias = arguments > 4 ? (Handle)(uintptr_t)stack[4] : NULL;
    const Call call = call_of(x, (int64_t)stack[2], (int64_t)stack[3]);
    (void)results;
    const int failed = qm_matmul(data_of(weight), call.x, bias ? data_of(bias) : NULL,
                                 data_of(call.y), call.kind, call.batch, call.threads);
    must(failed == 0, failed == -2 ? "the weight is not at a multiple of 64 bytes"
                                   : "no memory for the activations");
    finish(&call, stack, bias);
}

/* linear(x, weight) and linear_bias(x, weight, bias). */
static void linear(uint64_t *stack, uint64_t arguments, uint64_t results) {
    Handle x = (Handle)(uintptr_t)stack[0], weight = (Handle)(uintptr_t)stack[1];
    Handle bias = arguments > 2 ? (Handle)(uintptr_t)stack[2] : NULL;
    int64_t *sizes = NULL;
    (void)results;
    must(torch.sizes(weight, &sizes) == 0, "a weight without sizes");
    const int64_t rows = sizes[0], columns = sizes[1];
    const Call call = call_of(x, rows, columns);
    must(call.kind == QM_BF16, "x is not bfloat16");
    const int failed =
        qm_linear(data_of(weight), call.x, bias ? data_of(bias) : NULL, data_of(call.y), rows,
                  columns, call.batch, call.threads);
    must(failed == 0, failed == -2 ? "no dot products of bfloat16" : "too many rows");
    finish(&call, stack, bias);
}

QM_API int qm_operators(const void *const *functions) {
    Handle library = NULL;
    memcpy(&torch, functions, sizeof torch);
    if (torch.library("quantmill_cpu", "CPU", __FILE__, __LINE__, &library) != 0) return -1;
    if (torch.implement(library, "product", product) != 0) return -1;
    if (torch.implement(library, "product_bias", product) != 0) return -1;
    if (torch.implement(library, "linear", linear) != 0) return -1;
    return torch.implement(library, "linear_bias", linear) != 0 ? -1 : 0;
}
