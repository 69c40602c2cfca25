"""One rank of a training job: data, step loop, metrics."""
