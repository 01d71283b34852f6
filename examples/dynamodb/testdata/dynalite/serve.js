// Serves dynalite on a free port of 127.0.0.1, which its own command cannot do,
// and prints the URL. It ends when its standard input does, with the tests.
const server = require('dynalite')({ createTableMs: 0 });
server.listen(0, '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}`));
process.stdin.on('end', () => process.exit()).resume();
