"""What every suite is measured with: problem, provider, machine, measure, worker, report, tables."""
