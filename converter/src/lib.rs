//! Quantizes a model layer by layer with SliM-LLM and packs it into a SliM file.
