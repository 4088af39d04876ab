// Launch plans for Python: see kernels/_plans.py, which records what these run.

#include <ATen/ScalarOps.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Layout.h>
#include <torch/csrc/MemoryFormat.h>
#include <torch/csrc/utils/pybind.h>

#include "planned.h"

namespace deit_fast {
namespace {

at::ScalarType dtype_of(py::handle dtype) {
  TORCH_CHECK(THPDtype_Check(dtype.ptr()), "expected a torch.dtype");
  return reinterpret_cast<THPDtype *>(dtype.ptr())->scalar_type;
}

c10::Device device_of(py::handle device) {
  TORCH_CHECK(THPDevice_Check(device.ptr()), "expected a torch.device");
  return reinterpret_cast<THPDevice *>(device.ptr())->device;
}

at::DimVector dims(py::handle numbers) {
  auto found = numbers.cast<std::vector<int64_t>>();
  return at::DimVector(found.begin(), found.end());
}

Shape shape_of(py::handle sizes, py::handle strides, py::handle dtype) {
  return {dims(sizes), dims(strides), dtype_of(dtype)};
}

c10::List<bool> bools(const py::list &list) {
  c10::List<bool> found;
  for (py::handle one : list)
    found.push_back(one.cast<bool>());
  return found;
}

// A constant argument of an operator. Throws for kinds that no operator of ours is called with.
c10::IValue constant(py::handle value) {
  PyObject *o = value.ptr();
  if (value.is_none())
    return {};
  if (PyBool_Check(o))
    return value.cast<bool>();
  if (PyLong_Check(o))
    return value.cast<int64_t>();
  if (PyFloat_Check(o))
    return value.cast<double>();
  if (PyUnicode_Check(o))
    return value.cast<std::string>();
  if (THPDtype_Check(o))
    return (int64_t)dtype_of(value);
  if (THPDevice_Check(o))
    return device_of(value);
  if (THPLayout_Check(o))
    return (int64_t)reinterpret_cast<THPLayout *>(o)->layout;
  if (THPMemoryFormat_Check(o))
    return (int64_t)reinterpret_cast<THPMemoryFormat *>(o)->memory_format;
  if (PyList_Check(o) || PyTuple_Check(o)) {
    auto list = value.cast<py::list>();
    if (list.size() && PyBool_Check(list[0].ptr()))
      return bools(list);
    if (list.size() && PyFloat_Check(list[0].ptr()))
      return value.cast<std::vector<double>>();
    return value.cast<std::vector<int64_t>>();
  }
  TORCH_CHECK(false, "an argument of type ", Py_TYPE(o)->tp_name);
}

// Builds a plan step by step.
class Builder {
public:
  Builder(int inputs, int slots, py::handle device)
      : plan(std::make_shared<Plan>(inputs, slots, device_of(device))) {}

  void alloc(const py::list &last, int slot, py::handle sizes, py::handle strides,
             py::handle dtype) {
    plan->allocs.push_back({slot, shape_of(sizes, strides, dtype)});
    step(Step::ALLOC, plan->allocs.size(), last);
  }

  void view(const py::list &last, int slot, int base, py::handle sizes, py::handle strides,
            py::handle dtype, int64_t bytes) {
    plan->views.push_back({slot, base, shape_of(sizes, strides, dtype), bytes});
    step(Step::VIEW, plan->views.size(), last);
  }

  // arguments: in the order of the schema; a tensor is (slot,), a list of them [(slot,), ...]
  void call(const py::list &last, const std::string &name, const std::string &overload,
            const py::list &arguments, std::vector<int> results) {
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    Call call{op, {}, {}, {}, std::move(results)};
    for (py::handle argument : arguments) {
      int place = (int)call.arguments.size();
      const auto &type = *op.schema().arguments()[place].type();
      call.arguments.emplace_back();
      if (is_slot(argument)) {
        call.tensors.emplace_back(place, slot_of(argument));
      } else if (py::isinstance<py::list>(argument) && py::len(argument) &&
                 is_slot(argument.cast<py::list>()[0])) {
        std::vector<int> slots;
        for (py::handle one : argument)
          slots.push_back(slot_of(one));
        call.lists.emplace_back(place, std::move(slots));
      } else {
        call.arguments[place] = constant(argument);
        c10::IValue &value = call.arguments[place];
        if (type.kind() == c10::TypeKind::FloatType && value.isInt())
          value = (double)value.toInt();
        if (type.kind() == c10::TypeKind::TensorType && value.isScalar()) { // as Python's does
          Tensor number = c10::scalar_to_tensor(value.toScalar());
          number.unsafeGetTensorImpl()->set_wrapped_number(true);
          value = number;
        }
      }
    }
    plan->calls.push_back(std::move(call));
    step(Step::CALL, plan->calls.size(), last);
  }

  // one: see `_plan_recorder.Launch`
  void launch(const py::list &last, const py::dict &one) {
    Launch launch;
    launch.name = one["name"].cast<std::string>();
    launch.function = reinterpret_cast<CUfunction>(one["function"].cast<uintptr_t>());
    auto grid = one["grid"].cast<std::vector<unsigned>>();
    std::copy_n(grid.begin(), 3, launch.grid);
    launch.threads = one["threads"].cast<unsigned>();
    launch.shared = one["shared"].cast<unsigned>();
    launch.cluster = one["cluster"].cast<unsigned>();
    launch.cooperative = one["cooperative"].cast<bool>();
    launch.dependent = one["dependent"].cast<bool>();
    launch.parameters = one["parameters"].cast<std::string>();
    launch.offsets = one["offsets"].cast<std::vector<size_t>>();
    TORCH_CHECK(launch.parameters.size() <= Launch::MOST_BYTES &&
                    launch.offsets.size() <= Launch::MOST_PARAMETERS,
                launch.name, ": too many parameters");
    for (auto [at, slot, bytes] : one["pointers"].cast<std::vector<std::tuple<size_t, int, int64_t>>>())
      launch.pointers.push_back({at, slot, bytes});
    for (py::handle map : one["maps"])
      launch.maps.push_back(map_of(map.cast<py::dict>()));
    launch.compiled = shared(one["compiled"]);
    plan->launches.push_back(std::move(launch));
    step(Step::LAUNCH, plan->launches.size(), last);
  }

  // run: called with the tensors in these slots
  void interpreted(const py::list &last, std::vector<int> slots, py::object run) {
    plan->interpreted.push_back({[slots = std::move(slots), held = shared(std::move(run))](const Slots &from) {
      py::gil_scoped_acquire gil;
      py::list tensors;
      for (int slot : slots)
        tensors.append(py::cast(from[slot]));
      (*held)(tensors);
    }});
    step(Step::INTERPRETED, plan->interpreted.size(), last);
  }

  size_t begin_range(const std::string &name) {
    plan->ranges.push_back({name, 0});
    step(Step::RANGE, plan->ranges.size(), py::list());
    return plan->ranges.size() - 1;
  }
  void end_range(size_t range) { plan->ranges[range].end = plan->steps.size(); }

  std::shared_ptr<Plan> done(std::vector<int> outputs) {
    plan->outputs = std::move(outputs);
    return std::move(plan);
  }

private:
  std::shared_ptr<Plan> plan;

  static bool is_slot(py::handle o) { return PyTuple_CheckExact(o.ptr()); }
  static int slot_of(py::handle o) { return o.cast<py::tuple>()[0].cast<int>(); }

  void step(Step::Kind kind, size_t count, const py::list &last) {
    plan->steps.push_back({kind, count - 1, last.cast<std::vector<int>>()});
  }

  static Map map_of(const py::dict &one) {
    Map map;
    map.at = one["at"].cast<size_t>();
    map.slot = one["slot"].cast<int>();
    map.bytes = one["bytes"].cast<int64_t>();
    map.type = (CUtensorMapDataType)one["type"].cast<int>();
    map.swizzle = (CUtensorMapSwizzle)one["swizzle"].cast<int>();
    map.fill = one["nan"].cast<bool>() ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA
                                       : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    map.sizes = one["sizes"].cast<std::vector<cuuint64_t>>();
    map.strides = one["strides"].cast<std::vector<cuuint64_t>>();
    map.box = one["box"].cast<std::vector<cuuint32_t>>();
    map.small = one["small"].cast<bool>();
    return map;
  }
};

std::shared_ptr<Pair> make_pair(std::shared_ptr<Plan> forward, std::shared_ptr<Plan> backward,
                                std::vector<int> saved, size_t first, py::object again) {
  return std::shared_ptr<Pair>(new Pair{std::move(forward), std::move(backward), std::move(saved),
                                        first, shared(std::move(again))});
}

// arguments: what the function is called with, now. guards: `Guards`.
std::shared_ptr<Kind> kind_of(py::handle device, const py::tuple &arguments, py::object guards) {
  auto kind = std::make_shared<Kind>(State::now(device_of(device).type()), arguments.ptr());
  kind->guards = std::move(guards);
  return kind;
}

// pair: None where no plan can be made. held: parameters and buffers that are inputs of its plans.
// result: of the call, with numbers in the place of tensors.
void add(Planned &planned, std::shared_ptr<Kind> kind, std::shared_ptr<Pair> pair,
         const py::list &held, py::object result) {
  kind->parameters = py::tuple(held);
  for (size_t i = 0; i < held.size(); ++i)
    kind->held.emplace_back(kind->parameter(i));
  kind->pair = std::move(pair);
  kind->result = std::move(result);
  planned.add(std::move(kind));
}

template <class T> T &of(PyObject *self) { return py::cast<T &>(py::handle(self)); }

bool is_made(PyObject *self) {
  return reinterpret_cast<py::detail::instance *>(self)->simple_value_holder[0] != nullptr;
}

// The garbage collector has to see the guards: they hold the module that holds the plans.
void set_up_guards(PyHeapTypeObject *heap_type) {
  PyTypeObject *type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject *self, visitproc visit, void *arg) -> int {
    Py_VISIT(Py_TYPE(self));
    return is_made(self) ? of<Guards>(self).traverse(visit, arg) : 0;
  };
  type->tp_clear = [](PyObject *self) -> int {
    of<Guards>(self).clear();
    return 0;
  };
}

// Planned is called without pybind11's search for an overload.
void set_up_planned(PyHeapTypeObject *heap_type) {
  PyTypeObject *type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject *self, visitproc visit, void *arg) -> int {
    Py_VISIT(Py_TYPE(self));
    if (!is_made(self))
      return 0;
    for (auto &kind : of<Planned>(self).kinds) {
      Py_VISIT(kind->guards.ptr());
      Py_VISIT(kind->constants.ptr());
      Py_VISIT(kind->parameters.ptr());
      Py_VISIT(kind->result.ptr());
    }
    return 0;
  };
  type->tp_clear = [](PyObject *self) -> int {
    of<Planned>(self).kinds.clear();
    return 0;
  };
  type->tp_call = [](PyObject *self, PyObject *arguments, PyObject *) -> PyObject * {
    HANDLE_TH_ERRORS // PyTorch's classes: torch.OutOfMemoryError
    return of<Planned>(self).call(arguments);
    END_HANDLE_TH_ERRORS
  };
}

} // namespace
} // namespace deit_fast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace deit_fast;
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def_property_readonly("launches", [](const Plan &plan) { return plan.launches.size(); })
      .def_property_readonly("calls", [](const Plan &plan) { return plan.calls.size(); });
  py::class_<Pair, std::shared_ptr<Pair>>(m, "Pair")
      .def_readonly("forward", &Pair::forward)
      .def_readonly("backward", &Pair::backward);
  py::class_<Kind, std::shared_ptr<Kind>>(m, "Kind").def(py::init(&kind_of));
  py::class_<Builder>(m, "Builder")
      .def(py::init<int, int, py::handle>())
      .def("alloc", &Builder::alloc)
      .def("view", &Builder::view)
      .def("call", &Builder::call)
      .def("launch", &Builder::launch)
      .def("interpreted", &Builder::interpreted)
      .def("begin_range", &Builder::begin_range)
      .def("end_range", &Builder::end_range)
      .def("done", &Builder::done);
  py::class_<Guards>(m, "Guards", py::custom_type_setup(set_up_guards))
      .def(py::init<const py::list &>())
      .def("hold", &Guards::hold);
  py::class_<Planned>(m, "Planned", py::custom_type_setup(set_up_planned))
      .def(py::init<bool>())
      .def("add", &add)
      .def_readonly("stale", &Planned::stale)
      .def_property_readonly("pairs", [](const Planned &planned) {
        std::vector<std::shared_ptr<Pair>> found;
        for (const auto &kind : planned.kinds)
          if (kind->pair)
            found.push_back(kind->pair);
        return found;
      });
  m.def("make_pair", &make_pair);
  m.def("why_seen", &State::why_seen);
  m.def("runs", [] { return Planned::all_runs; });
  m.def("changed", [] { ++State::epoch_now; });
}
