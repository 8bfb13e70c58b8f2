"""From any checkpoint that can be read to any format that can be written, without loss where the
two can hold the same values: a survey, a route, and the same engine and sinks as everywhere."""
