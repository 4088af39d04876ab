// The CUDA driver: what of it a plan calls, and the current stream.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include "cuda.h" // Triton's: the driver's types, without the CUDA toolkit

namespace deit_fast {

struct Driver {
  decltype(&cuLaunchKernelEx) launch;
  decltype(&cuTensorMapEncodeTiled) encode; // null where the driver has none: before CUDA 12
  decltype(&cuGetErrorString) error;
  decltype(&cuCtxGetCurrent) current;
  decltype(&cuDevicePrimaryCtxRetain) retain;
  decltype(&cuCtxSetCurrent) set_current;
  int version; // 13010: CUDA 13.1

  static const Driver &get() {
    static const Driver driver = load();
    return driver;
  }

  void check(CUresult result, const std::string &what) const {
    if (result == CUDA_SUCCESS)
      return;
    const char *text = nullptr;
    error(result, &text);
    TORCH_CHECK(false, what, ": the CUDA driver says: ", text ? text : "unknown error");
  }

  // A thread in which PyTorch has done nothing yet has no context, and a launch needs one.
  void make_current(c10::Device device) const {
    CUcontext context = nullptr;
    check(current(&context), "cuCtxGetCurrent");
    if (context)
      return;
    check(retain(&context, device.has_index() ? device.index() : 0), "cuDevicePrimaryCtxRetain");
    check(set_current(context), "cuCtxSetCurrent");
  }

private:
  static Driver load() {
    void *library = dlopen("libcuda.so.1", RTLD_LAZY); // Triton has loaded it
    TORCH_CHECK(library, "libcuda.so.1 can't be loaded: ", dlerror());
    auto find = [library](const char *name) { return dlsym(library, name); };
    Driver found{(decltype(launch))find("cuLaunchKernelEx"),
                 (decltype(encode))find("cuTensorMapEncodeTiled"),
                 (decltype(error))find("cuGetErrorString"),
                 (decltype(current))find("cuCtxGetCurrent"),
                 (decltype(retain))find("cuDevicePrimaryCtxRetain"),
                 (decltype(set_current))find("cuCtxSetCurrent"), 0};
    bool all = found.launch && found.error && found.current && found.retain && found.set_current;
    TORCH_CHECK(all, "libcuda.so.1 has no cuLaunchKernelEx: CUDA 11.8 or newer is needed");
    if (auto version = (decltype(&cuDriverGetVersion))find("cuDriverGetVersion"))
      version(&found.version);
    return found;
  }
};

// PyTorch's current stream on a device. The CPU has none: there only a stand-in launches.
inline CUstream current_stream(c10::Device device) {
  if (!device.is_cuda())
    return nullptr;
  c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<CUstream>(guard.getStream(device).native_handle());
}

} // namespace deit_fast
