// Device guard and current stream without a CUDA header of torch (CPU builds of torch do not ship them).
#pragma once

#include <cstdint>

extern "C" {
// A stable C function of torch's; weak, because only CUDA builds of torch have it.
int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));
}

namespace mlopt {

// Selects a device for the life of the object; defined in device.cu.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  const char* error() const { return error_; }

 private:
  int previous_ = -1;
  const char* error_ = nullptr;
};

}  // namespace mlopt
