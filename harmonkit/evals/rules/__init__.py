"""The benchmarks' scoring rules as pure functions: no files, no tensors, one public function a rule."""
