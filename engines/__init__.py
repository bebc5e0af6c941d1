"""From graphs to engines, and from engines to checked pictures; reads files, knows nothing of the method."""
