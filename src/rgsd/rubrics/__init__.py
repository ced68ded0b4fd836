"""Rubric data types and the datasets' scores."""

from rgsd.rubrics.rubric import *
