"""The seven stages. Each is a function on a :class:`quantmill.job.Job` and callable alone."""
