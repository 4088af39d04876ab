// A plan: what a forward or a backward does on the device, as a list of steps without Python.
//
// Tensors live in numbered slots. The first slots are the inputs. Each of the others holds a
// tensor that a step makes, and is emptied after the last step that reads it.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <atomic>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "driver.h"

namespace deit_fast {

using at::Tensor;
using Slots = std::vector<Tensor>;

// A tensor of a slot's memory: sizes and strides in elements of `dtype`, the offset from the
// slot's own first element in bytes.
struct Shape {
  at::DimVector sizes, strides;
  at::ScalarType dtype;
};

// A new tensor with nothing in it.
struct Alloc {
  int slot;
  Shape shape;

  void run(Slots &slots, c10::Device device, c10::Allocator *allocator) const {
    auto keys = c10::DispatchKeySet(c10::computeDispatchKey(shape.dtype, at::kStrided, device));
    slots[slot] = Tensor(at::detail::empty_strided_generic(shape.sizes, shape.strides, allocator,
                                                           keys, shape.dtype));
  }
};

// Another tensor on the memory of a slot.
struct View {
  int slot, base;
  Shape shape;
  int64_t bytes;

  void run(Slots &slots) const {
    const Tensor &from = slots[base];
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(from.storage()), from.key_set(),
        c10::scalarTypeToTypeMeta(shape.dtype));
    int64_t start = from.storage_offset() * (int64_t)from.element_size() + bytes;
    auto *impl = view.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(shape.sizes, shape.strides, start / (int64_t)view.element_size());
    slots[slot] = std::move(view);
  }
};

// An operator of PyTorch's, below autograd.
struct Call {
  c10::OperatorHandle op;
  torch::jit::Stack arguments;                    // tensors left out
  std::vector<std::pair<int, int>> tensors;       // argument, slot
  std::vector<std::pair<int, std::vector<int>>> lists; // argument, slots
  std::vector<int> results;                       // slot of each; -1: it is an argument

  void run(Slots &slots) const {
    torch::jit::Stack stack = arguments;
    for (auto [argument, slot] : tensors)
      stack[argument] = slots[slot];
    for (const auto &[argument, from] : lists) {
      c10::List<Tensor> list;
      for (int slot : from)
        list.push_back(slots[slot]);
      stack[argument] = std::move(list);
    }
    op.callBoxed(stack);
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i] < 0)
        continue;
      auto &value = stack[stack.size() - results.size() + i];
      slots[results[i]] = std::move(value).toTensor();
    }
  }
};

inline char *address(const Slots &slots, int slot, int64_t bytes) {
  const Tensor &t = slots[slot];
  return static_cast<char *>(t.unsafeGetTensorImpl()->mutable_data()) + bytes;
}

// The tensor map of a descriptor, encoded anew when its tensor lies elsewhere.
struct Map {
  size_t at; // in the parameters
  int slot;
  int64_t bytes;
  CUtensorMapDataType type;
  CUtensorMapSwizzle swizzle;
  CUtensorMapFloatOOBfill fill;
  std::vector<cuuint64_t> sizes, strides; // innermost first; strides in bytes, without the first
  std::vector<cuuint32_t> box;
  bool small; // less than 128 KiB

  struct Cached {
    alignas(64) CUtensorMap map;
    void *at = nullptr;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
  };
  std::unique_ptr<Cached> cached = std::make_unique<Cached>();

  void put(void *pointer, char *parameters) const {
    if (!cached->busy.test_and_set(std::memory_order_acquire)) {
      if (cached->at != pointer) {
        cached->at = nullptr;
        CUresult result = encode(pointer, &cached->map);
        if (result == CUDA_SUCCESS)
          cached->at = pointer;
        else
          cached->busy.clear(std::memory_order_release);
        Driver::get().check(result, "cuTensorMapEncodeTiled");
      }
      memcpy(parameters + at, &cached->map, sizeof(CUtensorMap));
      cached->busy.clear(std::memory_order_release);
      return;
    }
    alignas(64) CUtensorMap map; // another thread has it
    Driver::get().check(encode(pointer, &map), "cuTensorMapEncodeTiled");
    memcpy(parameters + at, &map, sizeof map);
  }

private:
  CUresult encode(void *pointer, CUtensorMap *map) const {
    static const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
    CUresult result = Driver::get().encode(
        map, type, (cuuint32_t)box.size(), pointer, sizes.data(), strides.data(), box.data(), steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, fill);
    // Drivers up to CUDA 13.1 set this bit wrongly, for which Blackwell reads memory that is not
    // there: known issue of NVIDIA's release 595.71, and Triton clears it from 3.7 on
    if (result == CUDA_SUCCESS && small && Driver::get().version <= 13010)
      reinterpret_cast<cuuint64_t *>(map)[1] &= ~(cuuint64_t(1) << 21);
    return result;
  }
};

// A Triton kernel, with its parameters in memory as the driver reads them.
struct Launch {
  struct Pointer {
    size_t at;
    int slot;
    int64_t bytes;
  };
  std::string name;
  CUfunction function;
  unsigned grid[3], threads, shared, cluster;
  bool cooperative, dependent; // launch_cooperative_grid, launch_pdl
  std::string parameters;      // bytes
  std::vector<size_t> offsets; // of each parameter
  std::vector<Pointer> pointers;
  std::vector<Map> maps;
  std::shared_ptr<void> compiled; // Triton's, whose end would unload the kernel

  static constexpr size_t MOST_BYTES = 4096, MOST_PARAMETERS = 128; // sm_80's limit of bytes

  void run(const Slots &slots, CUstream stream) const {
    alignas(128) char bytes[MOST_BYTES];
    memcpy(bytes, parameters.data(), parameters.size());
    for (const auto &p : pointers) {
      char *pointer = address(slots, p.slot, p.bytes);
      memcpy(bytes + p.at, &pointer, sizeof pointer);
    }
    for (const auto &map : maps)
      map.put(address(slots, map.slot, map.bytes), bytes);
    void *arguments[MOST_PARAMETERS];
    for (size_t i = 0; i < offsets.size(); ++i)
      arguments[i] = bytes + offsets[i];
    CUlaunchAttribute attributes[4];
    CUlaunchConfig config{grid[0] * cluster, grid[1], grid[2], threads, 1, 1,
                          shared,            stream,  attributes, 0};
    auto add = [&](CUlaunchAttributeID id) -> CUlaunchAttributeValue & {
      attributes[config.numAttrs] = {};
      attributes[config.numAttrs].id = id;
      return attributes[config.numAttrs++].value;
    };
    if (dependent)
      add(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
          .programmaticStreamSerializationAllowed = 1;
    if (cooperative)
      add(CU_LAUNCH_ATTRIBUTE_COOPERATIVE).cooperative = 1;
    if (cluster > 1) {
      add(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION).clusterDim = {cluster, 1, 1};
      add(CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE)
          .clusterSchedulingPolicyPreference = CU_CLUSTER_SCHEDULING_POLICY_SPREAD;
    }
    Driver::get().check(Driver::get().launch(&config, function, arguments, nullptr), name);
  }
};

// The range of an operation, for profilers: it begins here, and ends `steps` later.
struct Range {
  std::string name;
  size_t end;
};

// A launch in Triton's interpreter, where plans are tested without a GPU.
struct Interpreted {
  std::function<void(const Slots &)> run;
};

struct Step {
  enum Kind { ALLOC, VIEW, CALL, LAUNCH, RANGE, INTERPRETED } kind;
  size_t index;
  std::vector<int> last; // slots that no later step reads
};

class Plan {
public:
  int inputs, slots;
  c10::Device device;
  std::vector<Step> steps;
  std::vector<int> outputs;
  std::vector<Alloc> allocs;
  std::vector<View> views;
  std::vector<Call> calls;
  std::vector<Launch> launches;
  std::vector<Range> ranges;
  std::vector<Interpreted> interpreted;

  Plan(int inputs, int slots, c10::Device device) : inputs(inputs), slots(slots), device(device) {}

  // `held` has a tensor in each of the first slots. After it, the outputs are in their slots.
  void run(Slots &held) const {
    held.resize(slots);
    c10::DeviceGuard guard(device);
    if (!launches.empty())
      Driver::get().make_current(device);
    CUstream stream = current_stream(device);
    c10::Allocator *allocator = c10::GetAllocator(device.type());
    if (C10_UNLIKELY(at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value()))
      return run_steps(0, steps.size(), held, stream, allocator, true);
    run_steps(0, steps.size(), held, stream, allocator, false);
  }

private:
  void run_steps(size_t begin, size_t end, Slots &held, CUstream stream, c10::Allocator *allocator,
                 bool profiled) const {
    for (size_t i = begin; i < end; ++i) {
      const Step &step = steps[i];
      switch (step.kind) {
      case Step::ALLOC:
        allocs[step.index].run(held, device, allocator);
        break;
      case Step::VIEW:
        views[step.index].run(held);
        break;
      case Step::CALL:
        calls[step.index].run(held);
        break;
      case Step::LAUNCH:
        launches[step.index].run(held, stream);
        break;
      case Step::INTERPRETED:
        interpreted[step.index].run(held);
        break;
      case Step::RANGE:
        if (profiled) {
          const Range &range = ranges[step.index];
          at::RecordFunction record(at::RecordScope::FUNCTION);
          if (record.isActive())
            record.before(range.name.c_str());
          run_steps(i + 1, range.end, held, stream, allocator, true);
          i = range.end - 1;
        }
        break;
      }
      for (int slot : step.last)
        held[slot].reset();
    }
  }
};

} // namespace deit_fast
