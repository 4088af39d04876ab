// What a plan was recorded under: it may run only while all of it is as it was.
#pragma once

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pythoncapi_compat.h>

namespace deit_fast {

namespace py = pybind11;
using at::Tensor;

// A Python object that threads without Python's lock may drop.
inline std::shared_ptr<py::object> shared(py::object object) {
  return {new py::object(std::move(object)), [](py::object *held) {
            if (Py_IsFinalizing()) { // nobody can take the lock any more
              held->release();
            } else {
              py::gil_scoped_acquire gil;
              *held = py::object();
            }
            delete held;
          }};
}

// The very object, or an equal number or string: no code in Python runs.
inline bool is_same(PyObject *a, PyObject *b) {
  if (a == b)
    return true;
  bool plain = PyLong_CheckExact(a) || PyFloat_CheckExact(a) || PyUnicode_CheckExact(a);
  return plain && Py_TYPE(a) == Py_TYPE(b) && PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

// Kept between calls: what of PyTorch's state a function may depend on.
struct State {
  bool grad, inference, autocast;
  at::ScalarType autocast_dtype;
  int flags;     // of PyTorch: which attention serves, and determinism
  int64_t epoch; // of our own settings: see `changed` in _plans.py

  static inline int64_t epoch_now = 0;

  static State now(c10::DeviceType device) {
    bool autocast = at::autocast::is_autocast_enabled(device);
    return {at::GradMode::is_enabled(), c10::InferenceMode::is_enabled(), autocast,
            autocast ? at::autocast::get_autocast_dtype(device) : at::kFloat, flags_now(),
            epoch_now};
  }
  static int flags_now() {
    const auto &context = at::globalContext();
    return context.userEnabledFlashSDP() | context.userEnabledMemEfficientSDP() << 1 |
           context.userEnabledMathSDP() << 2 | context.userEnabledCuDNNSDP() << 3 |
           context.deterministicAlgorithms() << 4;
  }
  bool operator==(const State &o) const {
    return grad == o.grad && inference == o.inference && autocast == o.autocast &&
           autocast_dtype == o.autocast_dtype && flags == o.flags && epoch == o.epoch;
  }
  bool operator!=(const State &o) const { return !(*this == o); }

  // Why Python has to see each operator of a call; null: it has not.
  static const char *why_seen() {
    if (c10::impl::TorchDispatchModeTLS::any_modes_set())
      return "a TorchDispatchMode is active";
    if (at::impl::torch_function_mode_enabled())
      return "a TorchFunctionMode is active";
    auto keys = c10::impl::tls_local_dispatch_key_set().included_;
    if (keys.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
      return "a transform of torch.func is active";
    if (keys.has(c10::DispatchKey::PythonDispatcher) || keys.has(c10::DispatchKey::Functionalize))
      return "PyTorch traces the call";
    if (torch::jit::tracer::isTracing())
      return "torch.jit.trace records the call";
    if (at::GradMode::is_enabled() && at::SavedTensorDefaultHooks::get_hooks().has_value())
      return "hooks for saved tensors are active";
    return nullptr;
  }
};

inline bool is_aligned(const Tensor &t) {
  return (reinterpret_cast<uintptr_t>(t.unsafeGetTensorImpl()->data()) & 15) == 0;
}

// Of a tensor: all that Python, the dispatcher and Triton's specialisation read of it.
struct TensorKey {
  at::DimVector sizes, strides;
  c10::DispatchKeySet keys;
  at::ScalarType dtype;
  c10::Device device;
  bool requires_grad, aligned;

  explicit TensorKey(const Tensor &t)
      : sizes(t.sizes()), strides(t.strides()), keys(t.key_set()), dtype(t.scalar_type()),
        device(t.device()), requires_grad(t.requires_grad()), aligned(is_aligned(t)) {}

  bool fits(const Tensor &t) const {
    const auto *impl = t.unsafeGetTensorImpl();
    return impl->key_set() == keys && impl->dtype() == c10::scalarTypeToTypeMeta(dtype) &&
           t.sizes() == sizes && t.strides() == strides && impl->device() == device &&
           t.requires_grad() == requires_grad && is_aligned(t) == aligned;
  }
};

// Of the modules: classes, attributes, children, parameters and hooks.
//
// Everything compared is held, so that an address never stands for a second object. Parents come
// before children: a child is read only while its parent still has it.
class Guards {
public:
  enum Kind { TYPE, CLASS, ITEM, VALUE, SIZE, MEMORY, ABSENT };

  explicit Guards(const py::list &checks) {
    for (py::handle one : checks) {
      auto check = one.cast<py::tuple>();
      auto held = [&](int i) { return Py_NewRef(PyTuple_GET_ITEM(check.ptr(), i)); };
      items.push_back({(Kind)check[0].cast<int>(), held(1), held(2), held(3), 0});
      if (items.back().kind == SIZE || items.back().kind == MEMORY)
        items.back().number = check[2].cast<uint64_t>();
    }
  }
  Guards(const Guards &) = delete;
  ~Guards() { clear(); }

  bool hold() const {
    for (const Item &item : items)
      if (!holds(item))
        return false;
    return true;
  }

  int traverse(visitproc visit, void *arg) const {
    for (const Item &item : items) {
      Py_VISIT(item.a);
      Py_VISIT(item.b);
      Py_VISIT(item.c);
    }
    return 0;
  }
  void clear() {
    auto taken = std::move(items);
    items.clear();
    for (const Item &item : taken) {
      Py_DECREF(item.a);
      Py_DECREF(item.b);
      Py_DECREF(item.c);
    }
  }

private:
  struct Item {
    Kind kind;
    PyObject *a, *b, *c;
    uint64_t number;
  };
  std::vector<Item> items;

  static bool holds(const Item &item) {
    switch (item.kind) {
    case TYPE: // object, class, -
      return (PyObject *)Py_TYPE(item.a) == item.b;
    case CLASS: // class, name, attribute as it is stored
      return _PyType_Lookup((PyTypeObject *)item.a, item.b) == item.c;
    case ITEM: // dictionary, key, the very object
      return PyDict_GetItemWithError(item.a, item.b) == item.c;
    case VALUE: { // dictionary, key, an equal number or string
      PyObject *found = PyDict_GetItemWithError(item.a, item.b);
      return found && is_same(found, item.c);
    }
    case SIZE: // dictionary, how many
      return (uint64_t)PyDict_GET_SIZE(item.a) == item.number;
    case ABSENT: // dictionary, key
      return PyDict_Contains(item.a, item.b) == 0;
    case MEMORY: { // tensor, address, dtype
      const auto *impl = THPVariable_Unpack(item.a).unsafeGetTensorImpl();
      return reinterpret_cast<uint64_t>(impl->data()) == item.number &&
             c10::typeMetaToScalarType(impl->dtype()) ==
                 reinterpret_cast<THPDtype *>(item.c)->scalar_type;
    }
    }
    return false;
  }
};

} // namespace deit_fast
