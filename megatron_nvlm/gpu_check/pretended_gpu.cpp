// One pretended NVIDIA GPU for a build of torch without CUDA.
//
// Its tensors say "cuda:0", lie in the memory of the host and are computed by the kernels of the CPU, so numbers are real.
// What a GPU refuses is refused here as well: an operation whose tensors lie on two devices.
// pretended_gpu.py compiles and loads this file, then calls nvlm_pretend_a_gpu().

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;
using c10::Storage;
using c10::Stream;

const Device kGpu(DeviceType::CUDA, 0);
const Device kHost(DeviceType::CPU);

// ---- The device: one of them, one stream, all work done at once -----------------------------------------------------

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return kGpu; }
  Device exchangeDevice(Device) const override { return kGpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return only_stream(); }
  Stream getDefaultStream(Device) const override { return only_stream(); }
  Stream getNewStream(Device, int) const override { return only_stream(); }
  Stream exchangeStream(Stream) const override { return only_stream(); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0.0; }

 private:
  static Stream only_stream() { return Stream(Stream::DEFAULT, kGpu); }
};

class Hooks final : public at::CUDAHooksInterface {
 public:
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return false; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
};

// ---- Tensors: each storage of the GPU owns a storage of the host with the same bytes --------------------------------

void release(void* owned) { delete static_cast<Storage*>(owned); }

c10::DataPtr pointer_to(const Storage& host) {
  return c10::DataPtr(const_cast<void*>(host.data()), new Storage(host), &release, kGpu);
}

Storage& host_storage(const Tensor& tensor) {
  void* owned = tensor.storage().data_ptr().get_context();
  TORCH_CHECK(owned != nullptr, "pretended GPU: a tensor of ", tensor.sizes(), " has no memory");
  return *static_cast<Storage*>(owned);
}

Tensor tensor_over(Storage storage, DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  Tensor made = tensor_over(host_storage(tensor), DispatchKey::CPU, tensor);
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  return made;
}

Tensor on_gpu(const Tensor& made, const std::vector<Tensor>& inputs) {
  if (!made.defined() || made.is_cuda() || made.is_meta() || made.is_sparse()) return made;
  for (const Tensor& input : inputs) {  // a view shares the storage of what it is a view of
    if (host_storage(input).unsafeGetStorageImpl() == made.storage().unsafeGetStorageImpl())
      return tensor_over(input.storage(), DispatchKey::CUDA, made);
  }
  const Storage& host = made.storage();
  Storage storage(Storage::use_byte_size_t(), host.nbytes(), pointer_to(host), nullptr, /*resizable=*/false);
  return tensor_over(std::move(storage), DispatchKey::CUDA, made);
}

// An operation may have given the host's tensor other memory or another shape; the GPU's tensor follows.
void follow(const Tensor& tensor, const Tensor& host) {
  const Storage& memory = host_storage(tensor);
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (storage->nbytes() != memory.nbytes() || storage->data() != memory.data()) {
    const size_t bytes = memory.nbytes();
    storage->set_data_ptr_noswap(pointer_to(Storage(memory)));
    storage->set_nbytes(bytes);
  }
  if (host.sizes() != tensor.sizes() || host.strides() != tensor.strides())
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
}

// ---- Operations: the CPU's, behind a check of devices ---------------------------------------------------------------

// Copies, and indices, which may lie on the host (a copy that makes the host wait).
const std::unordered_set<std::string> kTakesBothDevices = {
    "aten::copy_",      "aten::_copy_from",        "aten::_to_copy", "aten::set_",
    "aten::index",      "aten::index.Tensor",      "aten::index_put", "aten::index_put_",
    "aten::_index_put_impl_"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), schema_(op.schema()), stack_(stack), first_(stack->size() - schema_.arguments().size()),
        given_(stack->begin() + first_, stack->end()) {}

  void run() {
    for (size_t i = 0; i < given_.size(); ++i) (*stack_)[first_ + i] = argument(i);
    const bool mixed = sees_gpu_ && sees_host_;
    TORCH_CHECK(!mixed || kTakesBothDevices.count(schema_.name()),
                "Expected all tensors to be on the same device, but ", schema_.name(), " got some on cuda:0 and some on cpu");
    op_.callBoxed(stack_);
    for (size_t i = 0; i < gpu_.size(); ++i) follow(gpu_[i], host_[i]);
    const size_t results = schema_.returns().size();
    for (size_t i = 0; i < results; ++i) {
      IValue& value = (*stack_)[stack_->size() - results + i];
      value = result(i, value);
    }
  }

 private:
  Tensor taken(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      sees_host_ |= tensor.dim() > 0;  // a number may come from the host
      return tensor;
    }
    sees_gpu_ = true;
    gpu_.push_back(tensor);
    host_.push_back(on_host(tensor));
    return host_.back();
  }

  IValue argument(size_t i) {
    const IValue& value = given_[i];
    if (value.isTensor()) return taken(value.toTensor());
    if (value.isTensorList()) {
      std::vector<Tensor> found;
      for (const Tensor& tensor : value.toTensorVector()) found.push_back(taken(tensor));
      return found;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> found;
      for (std::optional<Tensor> tensor : value.toOptionalTensorList())
        found.push_back(tensor.has_value() ? std::optional<Tensor>(taken(*tensor)) : tensor);
      return found;
    }
    if (value.isDevice()) {
      names_gpu_ |= value.toDevice().is_cuda();
      names_host_ |= value.toDevice().is_cpu();
      return value.toDevice().is_cuda() ? IValue(kHost) : value;
    }
    if (value.isGenerator() && value.toGenerator().defined() && value.toGenerator().device().is_cuda())
      return at::detail::getDefaultCPUGenerator();
    if (schema_.arguments()[i].name() == "pin_memory") return IValue();
    return value;
  }

  IValue result(size_t i, const IValue& value) {
    if (const Tensor* written = written_argument(i)) return *written;
    if (names_host_ || !(sees_gpu_ || names_gpu_)) return value;
    if (value.isTensor()) return on_gpu(value.toTensor(), gpu_);
    if (value.isTensorList()) {
      std::vector<Tensor> found;
      for (const Tensor& tensor : value.toTensorVector()) found.push_back(on_gpu(tensor, gpu_));
      return found;
    }
    return value;
  }

  // The argument that an operation in place, or with `out=`, returns as its result.
  const Tensor* written_argument(size_t i) const {
    const auto* wanted = schema_.returns()[i].alias_info();
    if (!wanted || !wanted->isWrite()) return nullptr;
    for (size_t a = 0; a < given_.size(); ++a) {
      const auto* info = schema_.arguments()[a].alias_info();
      if (info && info->isWrite() && info->beforeSets() == wanted->beforeSets() && given_[a].isTensor())
        return &given_[a].toTensor();
    }
    return nullptr;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  const size_t first_;
  const std::vector<IValue> given_;
  std::vector<Tensor> gpu_, host_;
  bool sees_gpu_ = false, sees_host_ = false, names_gpu_ = false, names_host_ = false;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {  // torch has kernels of its own for these under any device's key
  for (const char* name : {"copy_", "empty.memory_format", "empty_strided", "as_strided", "view", "_reshape_alias",
                           "set_.source_Storage_storage_offset"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// The tensor of the host with the same memory, for collectives over gloo.
TORCH_LIBRARY(nvlm_pretended_gpu, library) { library.def("on_host(Tensor tensor) -> Tensor"); }
TORCH_LIBRARY_IMPL(nvlm_pretended_gpu, CUDA, library) { library.impl("on_host", &on_host); }
TORCH_LIBRARY_IMPL(nvlm_pretended_gpu, CPU, library) { library.impl("on_host", &on_host); }

extern "C" void nvlm_pretend_a_gpu() { c10::impl::registerDeviceGuard(DeviceType::CUDA, new Guard()); }
