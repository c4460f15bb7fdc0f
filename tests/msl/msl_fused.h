// Contraction by definition: a product that is an operand of a sum, in one expression, is fused into it (fma, rounded
// once), the left one where both operands are products. That is what FP_CONTRACT ON means in C and -ffp-contract=on in
// clang; here it is the same with every compiler, at every level of optimisation, with and without FMA instructions.
// Included after msl_emu.h and before a kernel's text, whose `float` it becomes. For kernels of float32.
#pragma once
namespace emu {
struct Product {          // not yet rounded: what becomes of it is for the next operator to say
  float a, b;
  float rounded() const { return a * b; }
};
struct Real {
  float v;
  Real() = default;
  Real(Product p) : v(p.rounded()) {}
  template <typename U, typename = typename std::enable_if<std::is_arithmetic<U>::value>::type>
  Real(U u) : v(static_cast<float>(u)) {}
  template <typename U, typename = typename std::enable_if<std::is_arithmetic<U>::value>::type>
  explicit operator U() const { return static_cast<U>(v); }
};
inline Product operator*(Real x, Real y) { return {x.v, y.v}; }
inline Product operator-(Product p) { return {-p.a, p.b}; }
inline Real operator-(Real x) { return -x.v; }
inline Real operator/(Real x, Real y) { return x.v / y.v; }
inline Real operator+(Real x, Real y) { return x.v + y.v; }
inline Real operator+(Product p, Real x) { return std::fma(p.a, p.b, x.v); }
inline Real operator+(Real x, Product p) { return std::fma(p.a, p.b, x.v); }
inline Real operator+(Product p, Product q) { return std::fma(p.a, p.b, q.rounded()); }
inline Real operator-(Real x, Real y) { return x.v - y.v; }
inline Real operator-(Product p, Real x) { return std::fma(p.a, p.b, -x.v); }
inline Real operator-(Real x, Product p) { return std::fma(-p.a, p.b, x.v); }
inline Real operator-(Product p, Product q) { return std::fma(p.a, p.b, -q.rounded()); }
inline bool operator<(Real x, Real y) { return x.v < y.v; }
inline bool operator>(Real x, Real y) { return x.v > y.v; }
inline bool operator==(Real x, Real y) { return x.v == y.v; }
template <typename U> Real& operator+=(Real& x, U u) { return x = x + u; }
template <typename U> Real& operator-=(Real& x, U u) { return x = x - u; }
template <typename U> Real& operator*=(Real& x, U u) { return x = Real(x * u); }
}  // namespace emu
namespace metal {
namespace precise { inline emu::Real exp(emu::Real x) { return std::exp(x.v); } }
}  // namespace metal
#define float emu::Real   /* also in the driver, where the template's arguments are named */
