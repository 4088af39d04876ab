/* PyTorch's own operators, on CPU tensors, without their work: the shape checks and the allocations
 * are PyTorch's, and where a GPU's kernel would be launched nothing happens.
 *
 * They take the place of the CPU's kernels from operators_install() to operators_remove(). What is
 * left of a call is the Python, the dispatcher and autograd that a CUDA tensor's call has as well.
 */
#include <ATen/EmptyTensor.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add_meta.h>
#include <ATen/ops/addmm_meta.h>
#include <ATen/ops/cat_meta.h>
#include <ATen/ops/div_meta.h>
#include <ATen/ops/gelu_backward_meta.h>
#include <ATen/ops/gelu_meta.h>
#include <ATen/ops/mean_meta.h>
#include <ATen/ops/mm_meta.h>
#include <ATen/ops/mul_meta.h>
#include <ATen/ops/sub_meta.h>
#include <ATen/ops/sum_meta.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <malloc.h>
#include <memory>
#include <set>
#include <string>
#include <torch/library.h>
#if __has_include(<ATen/core/Dimname.h>) /* PyTorch whose tensors have named dimensions */
#define NAMES_TYPE , at::DimnameList names
#define NAMES , names
#else
#define NAMES_TYPE
#define NAMES
#endif

namespace idle {
namespace {
using at::IntArrayRef;
using at::Tensor;
using Optional = const std::optional<Tensor> &;

long calls; /* of these operators */

Tensor empty(IntArrayRef sizes, const at::TensorOptions &options) {
  return at::detail::empty_cpu(sizes, options);
}
Tensor like(const Tensor &t, bool wanted = true) {
  return wanted ? empty(t.sizes(), t.options()) : Tensor();
}

/* A structured operator, as PyTorch's own code makes one of its shape function. */
template <class Shape> struct Idle final : Shape {
  Tensor out;
  explicit Idle(Tensor in_place = {}) : out(std::move(in_place)) { ++calls; }
  void set_output_strided(int64_t i, IntArrayRef sizes, IntArrayRef strides,
                          at::TensorOptions options NAMES_TYPE) override {
    if (!out.defined() && strides.empty())
      out = empty(sizes, options);
    else if (!out.defined())
      out = at::detail::empty_strided_cpu(sizes, strides, options);
    if constexpr (std::is_base_of_v<at::TensorIteratorBase, Shape>)
      Shape::set_output_raw_strided(i, sizes, strides, options NAMES);
  }
  void set_output_raw_strided(int64_t i, IntArrayRef sizes, IntArrayRef strides,
                              at::TensorOptions options NAMES_TYPE) override {
    set_output_strided(i, sizes, strides, options NAMES);
  }
  const Tensor &maybe_get_output(int64_t) override { return out; }
};

template <class Shape, class... Arguments> Tensor made(const Arguments &...arguments) {
  Idle<Shape> op;
  op.meta(arguments...);
  return op.out;
}

namespace meta = at::meta;
Tensor add(const Tensor &a, const Tensor &b, const at::Scalar &alpha) {
  return made<meta::structured_add_Tensor>(a, b, alpha);
}
Tensor &add_(Tensor &a, const Tensor &b, const at::Scalar &alpha) {
  Idle<meta::structured_add_Tensor> op(a);
  op.meta(a, b, alpha);
  return a;
}
Tensor sub(const Tensor &a, const Tensor &b, const at::Scalar &alpha) {
  return made<meta::structured_sub_Tensor>(a, b, alpha);
}
Tensor mul(const Tensor &a, const Tensor &b) { return made<meta::structured_mul_Tensor>(a, b); }
Tensor &mul_out(const Tensor &a, const Tensor &b, Tensor &out) {
  Idle<meta::structured_mul_Tensor> op(out);
  op.meta(a, b);
  return out;
}
Tensor div(const Tensor &a, const Tensor &b) { return made<meta::structured_div_Tensor>(a, b); }
Tensor &div_(Tensor &a, const Tensor &b) {
  Idle<meta::structured_div_Tensor> op(a);
  op.meta(a, b);
  return a;
}
Tensor mm(const Tensor &a, const Tensor &b) { return made<meta::structured_mm>(a, b); }
Tensor mm_dtype(const Tensor &a, const Tensor &b, at::ScalarType dtype) { /* CUDA's alone */
  ++calls;
  return empty({a.size(0), b.size(1)}, a.options().dtype(dtype));
}
Tensor addmm(const Tensor &c, const Tensor &a, const Tensor &b, const at::Scalar &beta,
             const at::Scalar &alpha) {
  return made<meta::structured_addmm>(c, a, b, beta, alpha);
}
Tensor cat(const at::ITensorListRef &tensors, int64_t dim) {
  return made<meta::structured_cat>(tensors, dim);
}
Tensor gelu(const Tensor &x, std::string_view form) {
  return made<meta::structured_gelu>(x, form);
}
Tensor gelu_backward(const Tensor &dy, const Tensor &x, std::string_view form) {
  return made<meta::structured_gelu_backward>(dy, x, form);
}
Tensor sum(const Tensor &x, at::OptionalIntArrayRef dim, bool keep,
           std::optional<at::ScalarType> dtype) {
  return made<meta::structured_sum_dim_IntList>(x, dim, keep, dtype);
}
Tensor &sum_out(const Tensor &x, at::OptionalIntArrayRef dim, bool keep,
                std::optional<at::ScalarType> dtype, Tensor &out) {
  Idle<meta::structured_sum_dim_IntList> op(out);
  op.meta(x, dim, keep, dtype);
  return out;
}
Tensor mean(const Tensor &x, at::OptionalIntArrayRef dim, bool keep,
            std::optional<at::ScalarType> dtype) {
  return made<meta::structured_mean_dim>(x, dim, keep, dtype);
}

/* The others have their checks in their kernels; what follows are the allocations. */
Tensor &copy_(Tensor &to, const Tensor &, bool) { return ++calls, to; }
void foreach_copy_(at::TensorList, at::TensorList, bool) { ++calls; } /* one launch of CUDA's */
Tensor &fill_(Tensor &x, const at::Scalar &) { return ++calls, x; }
Tensor &zero_(Tensor &x) { return ++calls, x; }

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

Three layer_norm(const Tensor &x, IntArrayRef normalized, Optional, Optional, double) {
  ++calls;
  at::DimVector rows(x.sizes());
  for (size_t i = x.dim() - normalized.size(); i < rows.size(); ++i)
    rows[i] = 1;
  auto statistics = x.options().dtype(at::kFloat);
  return {like(x), empty(rows, statistics), empty(rows, statistics)};
}
Three layer_norm_backward(const Tensor &, const Tensor &x, IntArrayRef, const Tensor &,
                          const Tensor &, Optional weight, Optional bias, Mask wanted) {
  ++calls;
  return {like(x, wanted[0]), wanted[1] ? like(*weight) : Tensor(),
          wanted[2] ? like(*bias) : Tensor()};
}
std::tuple<Tensor, Tensor> attention(const Tensor &q, const Tensor &k, const Tensor &v, double,
                                     bool, Optional, std::optional<double>) {
  ++calls;
  auto out = empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  return {out, empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat))};
}
Three attention_backward(const Tensor &, const Tensor &q, const Tensor &k, const Tensor &v,
                         const Tensor &, const Tensor &, double, bool, Optional,
                         std::optional<double>) {
  ++calls;
  auto one = [](const Tensor &t) {
    return empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
  };
  return {one(q), one(k), one(v)};
}
Tensor convolution(const Tensor &x, const Tensor &weight, Optional, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool, IntArrayRef, int64_t) {
  ++calls;
  at::DimVector sizes{x.size(0), weight.size(0)};
  for (int64_t i = 2; i < x.dim(); ++i) {
    int64_t reach = dilation[i - 2] * (weight.size(i) - 1) + 1;
    sizes.push_back((x.size(i) + 2 * padding[i - 2] - reach) / stride[i - 2] + 1);
  }
  return empty(sizes, x.options());
}
Three convolution_backward(const Tensor &dy, const Tensor &x, const Tensor &weight,
                           at::OptionalIntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool,
                           IntArrayRef, int64_t, Mask wanted) {
  ++calls;
  auto bias = wanted[2] ? empty({dy.size(1)}, dy.options()) : Tensor();
  return {like(x, wanted[0]), like(weight, wanted[1]), bias};
}

struct Quiet : c10::WarningHandler { /* that a kernel is replaced is no surprise */
  void process(const c10::Warning &) override {}
};
std::unique_ptr<torch::Library> replaced;

std::set<std::string> seen;
std::string listed;
at::CallbackHandle recording;
} // namespace
} // namespace idle
using namespace idle;

extern "C" {
void operators_install(void) {
  mallopt(M_MMAP_THRESHOLD, 1 << 30); /* memory that was freed is kept, as CUDA's is */
  mallopt(M_TRIM_THRESHOLD, 2147483647);
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  replaced = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CPU,
                                              __FILE__, __LINE__);
  replaced->impl("add.Tensor", idle::add)
      .impl("add_.Tensor", idle::add_)
      .impl("sub.Tensor", idle::sub)
      .impl("mul.Tensor", idle::mul)
      .impl("mul.out", idle::mul_out)
      .impl("div.Tensor", idle::div)
      .impl("div_.Tensor", idle::div_)
      .impl("mm", idle::mm)
      .impl("mm.dtype", idle::mm_dtype)
      .impl("addmm", idle::addmm)
      .impl("cat", idle::cat)
      .impl("gelu", idle::gelu)
      .impl("gelu_backward", idle::gelu_backward)
      .impl("sum.dim_IntList", idle::sum)
      .impl("sum.IntList_out", idle::sum_out)
      .impl("mean.dim", idle::mean)
      .impl("copy_", idle::copy_)
      .impl("_foreach_copy_", idle::foreach_copy_)
      .impl("fill_.Scalar", idle::fill_)
      .impl("zero_", idle::zero_)
      .impl("native_layer_norm", idle::layer_norm)
      .impl("native_layer_norm_backward", idle::layer_norm_backward)
      .impl("_scaled_dot_product_flash_attention_for_cpu", idle::attention)
      .impl("_scaled_dot_product_flash_attention_for_cpu_backward", idle::attention_backward)
      .impl("convolution", idle::convolution)
      .impl("convolution_backward", idle::convolution_backward);
}
void operators_remove(void) { replaced.reset(); }

long operators_calls(void) { return calls; }

/* Which operators are called, from a watch until it ends: names with a line break behind each. */
void operators_watch(void) {
  seen.clear();
  recording = at::addGlobalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction &fn) {
        if (auto name = fn.operator_name())
          seen.insert(c10::toString(*name));
        return std::unique_ptr<at::ObserverContext>();
      }).scopes({at::RecordScope::FUNCTION}));
}
const char *operators_seen(void) {
  at::removeCallback(recording);
  listed.clear();
  for (const auto &name : seen)
    listed += name + "\n";
  return listed.c_str();
}
}
