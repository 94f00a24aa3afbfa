// Numbers by order and not by a hash of names: those of modules federation hold the checkout's own path, and the same
// sources are to give the same bytes everywhere.
module.exports = { optimization: { moduleIds: 'natural', chunkIds: 'natural' } };
