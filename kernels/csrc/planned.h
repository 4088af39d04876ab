// A function with its plans: one for each kind of call, and the node of the autograd graph that
// runs the plan of its backward.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <list>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "guards.h"
#include "plan.h"

namespace deit_fast {

using torch::autograd::Edge;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePointer = decltype(Edge::function); // shared or intrusive, as the version has it

// Both plans of one kind of call, and what they read.
struct Pair {
  std::shared_ptr<Plan> forward, backward; // backward: null in inference
  std::vector<int> saved;                  // slots of forward that the node saves
  size_t first; // of the saved ones, that a second derivative needs: arguments, random numbers
  std::shared_ptr<py::object> again; // the function in Python, for a second derivative
};

struct BelowAutograd { // and below autocast, where the steps were recorded
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

struct PlanNode final : torch::autograd::Node {
  std::shared_ptr<Pair> pair;
  std::vector<SavedVariable> saved;
  std::vector<Tensor> held; // parameters and buffers

  std::string name() const override { return "DeitFastBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    saved.clear();
  }

  variable_list apply(variable_list &&grads) override {
    bool any = false;
    for (const Tensor &grad : grads)
      any |= grad.defined();
    if (!any)
      return variable_list(num_outputs());
    for (size_t i = 0; i < grads.size(); ++i) {
      grads[i] = grads[i].defined() ? grads[i].contiguous() : input_metadata(i).zeros_like();
      if (!is_aligned(grads[i])) // kernels were specialised for addresses of the allocator's
        grads[i] = grads[i].clone();
    }
    Slots slots;
    slots.reserve(pair->backward->slots);
    {
      std::lock_guard<std::mutex> lock(mutex_); // other threads may run this graph
      TORCH_CHECK(!saved.empty() || pair->saved.empty(), torch::autograd::ERR_BACKWARD_TWICE);
      for (auto &variable : saved)
        slots.push_back(variable.unpack(this_node<NodePointer>(this)));
    }
    if (at::GradMode::is_enabled())
      return differentiable(slots, grads);
    BelowAutograd below;
    slots.insert(slots.end(), grads.begin(), grads.end());
    pair->backward->run(slots);
    variable_list found;
    for (int slot : pair->backward->outputs)
      found.push_back(slot < 0 ? Tensor() : slots[slot]);
    return found;
  }

private:
  template <class Pointer, class Self> static Pointer this_node(Self *self) {
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
      return self->getptr();
    else
      return Pointer::reclaim_copy(self);
  }

  variable_list differentiable(const Slots &slots, const variable_list &grads) {
    py::gil_scoped_acquire gil;
    py::list tensors;
    for (size_t i = 0; i < pair->first; ++i)
      tensors.append(py::cast(slots[i]));
    for (const Tensor &t : held)
      tensors.append(py::cast(t));
    py::list upstream;
    for (const Tensor &t : grads)
      upstream.append(py::cast(t));
    variable_list found;
    for (py::handle grad : (*pair->again)(tensors, upstream))
      found.push_back(grad.is_none() ? Tensor() : grad.cast<Tensor>());
    return found;
  }
};

template <class Pointer = NodePointer> Pointer make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(new PlanNode, // found by its argument's namespace, where there is one
                   [](typename Pointer::element_type *node) { deleteNode(node); });
  else
    return Pointer(c10::make_intrusive<PlanNode>());
}

// A kind of call: what has to be as it was, and the plans, or none where none can be.
struct Kind {
  State state;
  py::tuple constants; // the arguments; a tensor's place holds None
  std::vector<std::pair<size_t, TensorKey>> tensors; // arguments
  py::tuple parameters; // and buffers: inputs beside the arguments; Python's, for its collector
  std::vector<TensorKey> held;
  py::object guards;          // `Guards`; null: seen once, and not recorded
  std::shared_ptr<Pair> pair; // null: not planned
  py::object result;          // of the call, with the number of an output in a tensor's place

  // arguments: what the function is called with, now.
  Kind(State state, PyObject *arguments) : state(state), constants(PyTuple_GET_SIZE(arguments)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
      PyObject *one = PyTuple_GET_ITEM(arguments, i);
      if (THPVariable_Check(one)) {
        tensors.emplace_back(i, TensorKey(THPVariable_Unpack(one)));
        one = Py_None;
      }
      PyTuple_SET_ITEM(constants.ptr(), i, Py_NewRef(one));
    }
  }

  enum Fit { OTHER, NOTED, STALE, FITS };

  Fit fit(const State &now, PyObject *arguments, const std::vector<const Tensor *> &given) const {
    if (now != state || given.size() != tensors.size())
      return OTHER;
    Py_ssize_t count = PyTuple_GET_SIZE(arguments);
    if (count != PyTuple_GET_SIZE(constants.ptr()))
      return OTHER;
    size_t next = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject *argument = PyTuple_GET_ITEM(arguments, i);
      if (next < tensors.size() && (size_t)i == tensors[next].first) {
        if (!THPVariable_Check(argument) || !tensors[next].second.fits(*given[next]))
          return OTHER;
        ++next;
        continue;
      }
      PyObject *constant = PyTuple_GET_ITEM(constants.ptr(), i);
      if (!is_same(argument, constant))
        return OTHER;
    }
    if (!guards) // a null object
      return NOTED;
    if (!guards.cast<const Guards &>().hold())
      return STALE;
    for (size_t i = 0; i < held.size(); ++i)
      if (!held[i].fits(parameter(i)))
        return STALE;
    return FITS;
  }

  const Tensor &parameter(size_t i) const {
    return THPVariable_Unpack(PyTuple_GET_ITEM(parameters.ptr(), i));
  }
};

class Planned {
public:
  static constexpr size_t MOST = 64; // kinds of calls that are kept
  static constexpr size_t FORGIVES = 64; // calls
  std::list<std::shared_ptr<Kind>> kinds; // the latest first
  size_t stale = 0; // kinds dropped because a module had changed, less one for each 64 plans run

  static inline size_t all_runs = 0; // plans that ran in this process, those of backward not counted

  explicit Planned(bool at_once) : at_once(at_once) {}

  // The function's result; NotImplemented: run it in Python; None: run it there and record it.
  //
  // A kind is recorded when it comes a second time (unless `at_once`): many sizes come only once.
  PyObject *call(PyObject *arguments) {
    if (State::why_seen())
      return Py_NewRef(Py_NotImplemented);
    std::vector<const Tensor *> given;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
      PyObject *argument = PyTuple_GET_ITEM(arguments, i);
      if (THPVariable_Check(argument)) {
        if (!THPVariable_CheckExact(argument))
          return Py_NewRef(Py_NotImplemented);
        given.push_back(&THPVariable_Unpack(argument));
      }
    }
    if (given.empty() || !(given[0]->is_cuda() || given[0]->is_cpu())) // a CPU stands in for a GPU
      return Py_NewRef(Py_NotImplemented);
    State now = State::now(given[0]->device().type());
    for (auto kind = kinds.begin(); kind != kinds.end(); ++kind) {
      switch ((*kind)->fit(now, arguments, given)) {
      case Kind::OTHER:
        continue;
      case Kind::NOTED:
        kinds.erase(kind);
        return Py_NewRef(Py_None);
      case Kind::STALE:
        ++stale;
        kinds.erase(kind);
        return note(now, arguments);
      case Kind::FITS:
        if (kind != kinds.begin())
          kinds.splice(kinds.begin(), kinds, kind);
        if (!(*kind)->pair)
          return Py_NewRef(Py_NotImplemented);
        ++all_runs;
        if (++runs % FORGIVES == 0 && stale)
          --stale;
        return run(**kind, given);
      }
    }
    return note(now, arguments);
  }

  void add(std::shared_ptr<Kind> kind) {
    kinds.push_front(std::move(kind));
    if (kinds.size() > MOST)
      kinds.pop_back();
  }

private:
  bool at_once;
  size_t runs = 0;

  PyObject *note(const State &now, PyObject *arguments) {
    if (at_once)
      return Py_NewRef(Py_None);
    add(std::make_shared<Kind>(now, arguments));
    return Py_NewRef(Py_NotImplemented);
  }

  static PyObject *run(const Kind &kind, const std::vector<const Tensor *> &given) {
    auto pair = kind.pair; // another thread may drop the kind
    py::object result = kind.result;
    Slots slots;
    slots.reserve(pair->forward->slots);
    for (const Tensor *t : given)
      slots.push_back(*t);
    for (size_t i = 0; i < kind.held.size(); ++i)
      slots.push_back(kind.parameter(i));
    std::vector<Tensor> outputs;
    {
      py::gil_scoped_release release;
      outputs = pair->backward ? record(pair, slots, given.size()) : compute(*pair, slots);
      slots.clear();
    }
    if (PyLong_CheckExact(result.ptr()))
      return THPVariable_Wrap(std::move(outputs[PyLong_AsLong(result.ptr())]));
    py::tuple made(PyTuple_GET_SIZE(result.ptr()));
    for (size_t i = 0; i < made.size(); ++i) {
      PyObject *one = PyTuple_GET_ITEM(result.ptr(), i);
      PyTuple_SET_ITEM(made.ptr(), i,
                       PyLong_CheckExact(one) ? THPVariable_Wrap(outputs[PyLong_AsLong(one)])
                                              : Py_NewRef(one));
    }
    return made.release().ptr();
  }

  static std::vector<Tensor> compute(const Pair &pair, Slots &slots) {
    BelowAutograd below;
    pair.forward->run(slots);
    std::vector<Tensor> outputs;
    for (int slot : pair.forward->outputs)
      outputs.push_back(slots[slot]);
    return outputs;
  }

  static bool is_output(const Pair &pair, int slot) {
    const auto &outputs = pair.forward->outputs;
    return std::find(outputs.begin(), outputs.end(), slot) != outputs.end();
  }

  // `compute`, with a node in the autograd graph.
  static std::vector<Tensor> record(const std::shared_ptr<Pair> &pair, Slots &slots,
                                    size_t arguments) {
    torch::autograd::edge_list edges;
    for (int i = 0; i < pair->forward->inputs; ++i)
      edges.push_back(slots[i].requires_grad() ? torch::autograd::impl::gradient_edge(slots[i])
                                               : Edge());
    std::vector<Tensor> held(slots.begin() + arguments, slots.begin() + pair->forward->inputs);
    std::vector<Tensor> outputs = compute(*pair, slots);
    NodePointer node = make_node();
    auto *made = static_cast<PlanNode *>(node.get());
    made->held = std::move(held);
    made->set_next_edges(std::move(edges));
    made->pair = pair;
    for (Tensor &output : outputs)
      torch::autograd::set_history(output, node);
    made->saved.reserve(pair->saved.size());
    for (int slot : pair->saved)
      made->saved.emplace_back(slots[slot], is_output(*pair, slot));
    return outputs;
  }
};

} // namespace deit_fast
