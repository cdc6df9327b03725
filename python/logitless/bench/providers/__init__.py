"""The competitors, each written once for CPU and GPU: floors, materialised losses, logitless, other libraries."""
