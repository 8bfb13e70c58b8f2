/* Searches for scales in lanes: the algorithms of quantmill_gguf.types.search, which is their
 * definition, in the same order of float32 operations. Internal: no part of the ABI.
 */
#ifndef QUANTMILL_GGML_FIT_H
#define QUANTMILL_GGML_FIT_H

#include "ggml_lanes.h"

#define QM_TINY 1e-15f /* groups whose values are all smaller are groups of zeros */
#define QM_MOST_CODES 32

/* Codes 0 to 2 half - 1 around half; returns the scale. */
QM_INLINE V fit_symmetric(const V *x, const V *w, int n, int half, V *codes) {
    const float low = -(float)half, high = (float)(half - 1);
    V top = farthest(x, n), found = low / top, scale, best;
    I zero = vabs(top) < QM_TINY;
    V product = {0}, square = {0}, moved[QM_MOST_CODES];
    for (int i = 0; i < n; i++) {
        moved[i] = w[i] * x[i];
        V code = clamp(nearest(found * x[i]), low, high);
        product += moved[i] * code;
        square += w[i] * code * code;
    }
    scale = zero_where(square == 0.0f, product / square);
    best = scale * product;
    for (int step = -9; step <= 9; step++) {
        if (step == 0) continue;
        V other = -((float)half + 0.1f * (float)step) / top;
        product = square = (V){0};
        for (int i = 0; i < n; i++) {
            V code = clamp(nearest(other * x[i]), low, high);
            product += moved[i] * code;
            square += w[i] * code * code;
        }
        I better = (square > 0.0f) & (product * product > best * square);
        V candidate = product / square;
        scale = sel(better, candidate, scale);
        best = sel(better, candidate * product, best);
        found = sel(better, other, found);
    }
    for (int i = 0; i < n; i++)
        codes[i] = zero_where(zero, clamp(nearest(found * x[i]), low, high) + (float)half);
    return zero_where(zero, scale);
}

/* Single codes move while that lowers the error; whether any did. The sums go along. */
QM_INLINE int move_codes(const V *x, const V *w, const V *moved, int n, float low, float high,
                         int positive, V *codes, V *product, V *square) {
    I changed = {0};
    for (int i = 0; i < n; i++) {
        V old = codes[i], rest = *product - moved[i] * old;
        V rest_square = *square - w[i] * old * old;
        V code = nearest(x[i] * rest_square / rest);
        code = positive ? vmin(code, SPLAT(high)) : clamp(code, low, high);
        V new_product = rest + moved[i] * code, new_square = rest_square + w[i] * code * code;
        I better = (rest > 0.0f) & (code != old) &
                   (new_product * new_product * *square > *product * *product * new_square);
        better &= (positive ? rest_square : new_square) > 0.0f;
        codes[i] = sel(better, code, old);
        *product = sel(better, new_product, *product);
        *square = sel(better, new_square, *square);
        changed |= better;
    }
    return any(changed);
}

/* Like fit_symmetric with squares as weights, from one scale on. */
QM_INLINE V fit_third_bit(const V *x, int n, int half, V *codes) {
    const float low = -(float)half, high = (float)(half - 1);
    V top = farthest(x, n), first = low / top, product = {0}, square = {0};
    V w[QM_MOST_CODES], moved[QM_MOST_CODES];
    I zero = vabs(top) < QM_TINY;
    for (int i = 0; i < n; i++) {
        w[i] = x[i] * x[i];
        moved[i] = w[i] * x[i];
        codes[i] = clamp(nearest(first * x[i]), low, high);
        product += moved[i] * codes[i];
        square += w[i] * codes[i] * codes[i];
    }
    for (int round = 0; round < 5; round++)
        if (!move_codes(x, w, moved, n, low, high, 0, codes, &product, &square)) break;
    for (int i = 0; i < n; i++) codes[i] = zero_where(zero, codes[i] + (float)half);
    V scale = product / square;
    return zero_where(zero | ~(square > 0.0f), scale);
}

/* Codes 0 to top of values that are not negative. */
QM_INLINE V fit_positive(const V *x, const V *w, int n, int top, V *codes) {
    V most = {0}, best = {0}, product = {0}, square = {0}, moved[QM_MOST_CODES];
    for (int i = 0; i < n; i++) most = vmax(most, x[i]);
    I zero = most < QM_TINY;
    V found = (float)top / most, scale = 1.0f / found;
    for (int i = 0; i < n; i++) {
        V away = x[i] - scale * nearest(found * x[i]);
        best += w[i] * away * away;
    }
    for (int step = -4; step <= 4; step++) {
        if (step == 0) continue;
        V other = (0.1f * (float)step + (float)top) / most, error = {0};
        scale = 1.0f / other;
        for (int i = 0; i < n; i++) {
            V away = x[i] - scale * vmin(nearest(other * x[i]), SPLAT((float)top));
            error += w[i] * away * away;
        }
        I better = error < best;
        best = sel(better, error, best);
        found = sel(better, other, found);
    }
    for (int i = 0; i < n; i++) {
        codes[i] = vmin(nearest(found * x[i]), SPLAT((float)top));
        moved[i] = w[i] * x[i];
        product += moved[i] * codes[i];
        square += w[i] * codes[i] * codes[i];
    }
    for (int round = 0; round < 5; round++)
        if (!move_codes(x, w, moved, n, 0.0f, (float)top, 1, codes, &product, &square)) break;
    for (int i = 0; i < n; i++) codes[i] = zero_where(zero, codes[i]);
    V result = product / square;
    return zero_where(zero | ~(square > 0.0f), result);
}

/* Codes 0 to top above a minimum of 0 or less, in `low` with its sign changed. */
QM_INLINE V fit_range(const V *x, const V *w, int n, int top, float first, float step, int steps,
                      int absolute, V *low_out, V *codes) {
    V total = {0}, moment = {0}, low = x[0], high = x[0], best = {0};
    for (int i = 0; i < n; i++) {
        low = vmin(x[i], low);
        high = vmax(x[i], high);
        total += w[i];
        moment += w[i] * x[i];
    }
    low = zero_where(low > 0.0f, low);
    I flat = high <= low;
    V found = (float)top / (high - low), scale = 1.0f / found, start = low;
    for (int i = 0; i < n; i++) {
        V code = clamp(nearest(found * (x[i] - low)), 0.0f, (float)top);
        V away = scale * code + low - x[i];
        best += w[i] * (absolute ? vabs(away) : away * away);
    }
    for (int index = 0; index <= steps; index++) {
        V level = (first + step * (float)index + (float)top) / (high - low);
        V linear = {0}, square = {0}, product = {0}, error = {0}, there[QM_MOST_CODES];
        for (int i = 0; i < n; i++) {
            V code = clamp(nearest(level * (x[i] - low)), 0.0f, (float)top);
            V weighted = w[i] * code;
            there[i] = code;
            linear += weighted;
            square += weighted * code;
            product += weighted * x[i];
        }
        V determinant = total * square - linear * linear;
        V new_scale = (total * product - moment * linear) / determinant;
        V new_low = (square * moment - linear * product) / determinant;
        I above = new_low > 0.0f;
        new_low = zero_where(above, new_low);
        new_scale = sel(above, product / square, new_scale);
        for (int i = 0; i < n; i++) {
            V away = new_scale * there[i] + new_low - x[i];
            error += w[i] * (absolute ? vabs(away) : away * away);
        }
        I better = (determinant > 0.0f) & (error < best);
        found = sel(better, level, found);
        start = sel(better, low, start);
        best = sel(better, error, best);
        scale = sel(better, new_scale, scale);
        low = sel(better, new_low, low);
    }
    for (int i = 0; i < n; i++) {
        V code = clamp(nearest(found * (x[i] - start)), 0.0f, (float)top);
        codes[i] = zero_where(flat, code);
    }
    *low_out = -low;
    return zero_where(flat, scale);
}

#endif
